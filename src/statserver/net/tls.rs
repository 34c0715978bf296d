//! The server's TLS: certificates from files that may change, and the client certificates that are
//! trusted.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tracing::{error, info};

use crate::cli::flags::Flags;
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
}

impl Protocol {
    fn alpn(self) -> Vec<Vec<u8>> {
        match self {
            Self::Http => vec![b"http/1.1".to_vec()],
            Self::Grpc => vec![b"h2".to_vec()],
        }
    }
}

/// The paths of the files.
#[derive(Clone, Debug)]
struct Files {
    certificate: PathBuf,
    key: PathBuf,
    client_ca: Option<PathBuf>,
}

/// What the files contained, and the configurations made of it.
struct Loaded {
    contents: [Vec<u8>; 3],
    http: Arc<ServerConfig>,
    grpc: Arc<ServerConfig>,
}

/// The server's certificates, as the files have them now.
pub struct Tls {
    files: Files,
    loaded: RwLock<Loaded>,
}

impl Tls {
    /// Reads the files, if there are any.
    ///
    /// # Errors
    /// In one line: which file, and what is wrong with it.
    pub fn load(flags: &Flags) -> Result<Option<Self>, String> {
        let (Some(certificate), Some(key)) = (flags.tls_cert.clone(), flags.tls_key.clone()) else {
            return Ok(None);
        };
        let files = Files { certificate, key, client_ca: flags.tls_client_ca.clone() };
        let loaded = files.read().and_then(|contents| files.load(contents))?;
        Ok(Some(Self { files, loaded: RwLock::new(loaded) }))
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
                info!(file = %self.files.certificate.display(), "loaded the changed certificates");
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
                Protocol::Http => Arc::clone(&loaded.http),
                Protocol::Grpc => Arc::clone(&loaded.grpc),
            }
        };
        TlsAcceptor::from(config).accept(stream).await
    }
}

impl Files {
    fn read(&self) -> Result<[Vec<u8>; 3], String> {
        let client_ca = self.client_ca.as_deref().map(|path| read("--tls-client-ca", path));
        Ok([
            read("--tls-cert", &self.certificate)?,
            read("--tls-key", &self.key)?,
            client_ca.transpose()?.unwrap_or_default(),
        ])
    }

    fn load(&self, contents: [Vec<u8>; 3]) -> Result<Loaded, String> {
        let [certificate, key, client_ca] = &contents;
        let provider = Arc::new(ring::default_provider());
        let chain = certificates("--tls-cert", &self.certificate, certificate)?;
        // The reason is not repeated: it may say what was read.
        let key = PrivateKeyDer::from_pem_slice(key)
            .map_err(|_| format!("--tls-key {}: expected a private key in PEM", self.key.display()))?;
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?;
        let builder = match &self.client_ca {
            None => builder.with_no_client_auth(),
            Some(path) => builder.with_client_cert_verifier(verifier(path, client_ca, provider)?),
        };
        let config = builder
            .with_single_cert(chain, key)
            .map_err(|error| format!("--tls-cert {} and --tls-key: {error}", self.certificate.display()))?;
        let config_for = |protocol: Protocol| {
            let mut config = config.clone();
            config.alpn_protocols = protocol.alpn();
            Arc::new(config)
        };
        Ok(Loaded { http: config_for(Protocol::Http), grpc: config_for(Protocol::Grpc), contents })
    }
}

/// A certificate is requested and not required: clients with tokens, and probes, have none.
fn verifier(
    path: &Path,
    pem: &[u8],
    provider: Arc<CryptoProvider>,
) -> Result<Arc<dyn rustls::server::danger::ClientCertVerifier>, String> {
    let invalid = |error: String| format!("--tls-client-ca {}: {error}", path.display());
    let mut roots = RootCertStore::empty();
    for certificate in certificates("--tls-client-ca", path, pem)? {
        roots.add(certificate).map_err(|error| invalid(error.to_string()))?;
    }
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
        .allow_unauthenticated()
        .build()
        .map_err(|error| invalid(error.to_string()))
}

fn certificates(flag: &str, path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match certificates {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        _ => Err(format!("{flag} {}: expected a certificate in PEM", path.display())),
    }
}

fn read(flag: &str, path: &Path) -> Result<Vec<u8>, String> {
    files::read(path, MAX_BYTES).map_err(|error| format!("{flag} {}: {error}", path.display()))
}
