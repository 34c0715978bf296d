//! The server's TLS: certificates from files that may change, and the client certificates that are
//! trusted.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};

use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tracing::{error, info};

use crate::os::files;

/// The largest file that is read.
const MAX_BYTES: u64 = 1 << 20;

/// What is spoken over a connection.
#[derive(Clone, Copy, Debug)]
pub enum Protocol {
    /// HTTP/1.1.
    Http,
    /// HTTP/2, for gRPC.
    Grpc,
    /// HTTP/1.1, by clients that are known by their certificates.
    MetricsApi,
}

impl Protocol {
    fn alpn(self) -> Vec<Vec<u8>> {
        match self {
            Self::Http | Self::MetricsApi => vec![b"http/1.1".to_vec()],
            Self::Grpc => vec![b"h2".to_vec()],
        }
    }
}

/// A file, and the flag that names it.
#[derive(Clone, Debug)]
pub struct NamedFile {
    /// The flag.
    pub flag: &'static str,
    /// The path.
    pub path: PathBuf,
}

/// The CA of client certificates.
#[derive(Clone, Debug)]
pub enum ClientCa {
    /// In a file.
    File(NamedFile),
    /// In memory, in PEM. While it is empty no certificate is asked for.
    Fetched(Arc<RwLock<Vec<u8>>>),
}

impl ClientCa {
    fn read(&self) -> Result<Vec<u8>, String> {
        match self {
            Self::File(file) => file.read(),
            Self::Fetched(pem) => Ok(pem.read().unwrap_or_else(PoisonError::into_inner).clone()),
        }
    }

    /// Returns what it is called in errors.
    fn name(&self) -> String {
        match self {
            Self::File(file) => file.to_string(),
            Self::Fetched(_) => "the request-header CA of the cluster".into(),
        }
    }
}

impl NamedFile {
    fn read(&self) -> Result<Vec<u8>, String> {
        files::read(&self.path, MAX_BYTES).map_err(|error| format!("{self}: {error}"))
    }
}

impl fmt::Display for NamedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.flag, self.path.display())
    }
}

/// What a server's TLS is made of.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// Its certificate chain.
    pub certificate: NamedFile,
    /// The key of that.
    pub key: NamedFile,
    /// The CA of its clients, if they may have certificates.
    pub client_ca: Option<ClientCa>,
}

/// What the files contained, and the configurations made of it.
struct Loaded {
    contents: [Vec<u8>; 3],
    http: Arc<ServerConfig>,
    grpc: Arc<ServerConfig>,
    verifier: Option<Arc<dyn ClientCertVerifier>>,
}

/// The server's certificates, as the files have them now.
pub struct Tls {
    files: TlsFiles,
    loaded: RwLock<Loaded>,
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// In one line: which file, and what is wrong with it.
    pub fn load(files: TlsFiles) -> Result<Self, String> {
        let loaded = files.read().and_then(|contents| files.load(contents))?;
        Ok(Self { files, loaded: RwLock::new(loaded) })
    }

    /// Returns whether the client CA signed a client's certificates, and they are good at this time.
    pub fn verify_client(&self, certificates: &[CertificateDer<'static>]) -> bool {
        let loaded = self.loaded.read().unwrap_or_else(PoisonError::into_inner);
        let verifier = loaded.verifier.clone();
        drop(loaded);
        let (Some(verifier), Some((own, intermediates))) = (verifier, certificates.split_first()) else {
            return false;
        };
        verifier.verify_client_cert(own, intermediates, UnixTime::now()).is_ok()
    }

    /// Loads the files again, for connections to come. Files that are wrong, or do not belong
    /// together, change nothing.
    pub fn reload(&self) {
        let loaded = self.files.read().and_then(|contents| {
            let same = self.loaded.read().unwrap_or_else(PoisonError::into_inner).contents == contents;
            if same { Ok(None) } else { self.files.load(contents).map(Some) }
        });
        match loaded {
            Ok(None) => {}
            Ok(Some(loaded)) => {
                info!(file = %self.files.certificate.path.display(), "loaded the changed certificates");
                *self.loaded.write().unwrap_or_else(PoisonError::into_inner) = loaded;
            }
            Err(reason) => error!(reason, "cannot load the changed certificates; keeping the old ones"),
        }
    }

    /// Shakes hands. A client with a certificate that the client CA did not sign is refused; one
    /// without a certificate is not authenticated.
    ///
    /// # Errors
    /// Whatever ends a handshake.
    pub async fn handshake(&self, stream: TcpStream, protocol: Protocol) -> io::Result<TlsStream<TcpStream>> {
        let config = {
            let loaded = self.loaded.read().unwrap_or_else(PoisonError::into_inner);
            match protocol {
                Protocol::Http | Protocol::MetricsApi => Arc::clone(&loaded.http),
                Protocol::Grpc => Arc::clone(&loaded.grpc),
            }
        };
        TlsAcceptor::from(config).accept(stream).await
    }
}

impl TlsFiles {
    fn read(&self) -> Result<[Vec<u8>; 3], String> {
        let client_ca = self.client_ca.as_ref().map(ClientCa::read).transpose()?;
        Ok([self.certificate.read()?, self.key.read()?, client_ca.unwrap_or_default()])
    }

    fn load(&self, contents: [Vec<u8>; 3]) -> Result<Loaded, String> {
        let [certificate, key, client_ca] = &contents;
        let provider = Arc::new(ring::default_provider());
        let chain = certificates(&self.certificate.to_string(), certificate)?;
        // The reason is not repeated: it may say what was read.
        let private_key = PrivateKeyDer::from_pem_slice(key)
            .map_err(|_| format!("{}: expected a private key in PEM", self.key))?;
        let verifier = match &self.client_ca {
            None => None,
            Some(ClientCa::Fetched(_)) if client_ca.is_empty() => None,
            Some(ca) => Some(verifier(&ca.name(), client_ca, Arc::clone(&provider))?),
        };
        let builder = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?;
        let builder = match &verifier {
            None => builder.with_no_client_auth(),
            Some(verifier) => builder.with_client_cert_verifier(Arc::clone(verifier)),
        };
        let config = builder
            .with_single_cert(chain, private_key)
            .map_err(|error| format!("{} and {}: {error}", self.certificate, self.key.flag))?;
        let config_for = |protocol: Protocol| {
            let mut config = config.clone();
            config.alpn_protocols = protocol.alpn();
            Arc::new(config)
        };
        let (http, grpc) = (config_for(Protocol::Http), config_for(Protocol::Grpc));
        Ok(Loaded { contents, http, grpc, verifier })
    }
}

/// A certificate is requested and not required: clients with tokens, and probes, have none.
fn verifier(
    name: &str,
    pem: &[u8],
    provider: Arc<CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, String> {
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots(name, pem)?), provider)
        .allow_unauthenticated()
        .build()
        .map_err(|error| format!("{name}: {error}"))
}

/// Reads the certificates of a CA.
///
/// # Errors
/// What is wrong with them; `name` says where they are from.
pub fn roots(name: &str, pem: &[u8]) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(name, pem)? {
        roots.add(certificate).map_err(|error| format!("{name}: {error}"))?;
    }
    Ok(roots)
}

fn certificates(name: &str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match certificates {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        _ => Err(format!("{name}: expected a certificate in PEM")),
    }
}
