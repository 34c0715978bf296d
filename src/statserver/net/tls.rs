//! TLS of the server's own: certificates out of files that may change, and who showed one of those that are trusted.

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
use crate::files;

/// The largest file that is read.
const MOST_BYTES: u64 = 1 << 20;

/// What a listener speaks within TLS.
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

#[derive(Clone, Debug)]
struct Files {
    certificate: PathBuf,
    key: PathBuf,
    client_ca: Option<PathBuf>,
}

/// What the files held, and what was made of it.
struct Made {
    contents: [Vec<u8>; 3],
    http: Arc<ServerConfig>,
    grpc: Arc<ServerConfig>,
}

/// The server's certificates, as the files have them now.
pub struct Tls {
    files: Files,
    made: RwLock<Made>,
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
        let made = files.read().and_then(|contents| files.make(contents))?;
        Ok(Some(Self { files, made: RwLock::new(made) }))
    }

    /// Takes over what the files hold now, for connections to come. Files that are wrong, or do not go together, change
    /// nothing.
    pub fn reload(&self) {
        let made = self.files.read().and_then(|contents| {
            let same = self.made.read().unwrap_or_else(PoisonError::into_inner).contents == contents;
            if same { Ok(None) } else { self.files.make(contents).map(Some) }
        });
        match made {
            Ok(None) => {}
            Ok(Some(made)) => {
                info!(file = %self.files.certificate.display(), "the certificates have changed");
                *self.made.write().unwrap_or_else(PoisonError::into_inner) = made;
            }
            Err(reason) => error!(reason, "the certificates stay as they were"),
        }
    }

    /// Shakes hands. Whoever shows a certificate that the client CA did not sign is turned away; who shows none is not known.
    ///
    /// # Errors
    /// Whatever ends a handshake.
    pub async fn accept(&self, stream: TcpStream, protocol: Protocol) -> io::Result<TlsStream<TcpStream>> {
        let config = {
            let made = self.made.read().unwrap_or_else(PoisonError::into_inner);
            match protocol {
                Protocol::Http => Arc::clone(&made.http),
                Protocol::Grpc => Arc::clone(&made.grpc),
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

    fn make(&self, contents: [Vec<u8>; 3]) -> Result<Made, String> {
        let [certificate, key, client_ca] = &contents;
        let provider = Arc::new(ring::default_provider());
        let chain = certificates("--tls-cert", &self.certificate, certificate)?;
        // The reason is not repeated: it may say what was read.
        let key = PrivateKeyDer::from_pem_slice(key)
            .map_err(|_| format!("--tls-key {}: no private key in PEM", self.key.display()))?;
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
        let speaking = |protocol: Protocol| {
            let mut config = config.clone();
            config.alpn_protocols = protocol.alpn();
            Arc::new(config)
        };
        Ok(Made { http: speaking(Protocol::Http), grpc: speaking(Protocol::Grpc), contents })
    }
}

/// A certificate is asked for and not insisted on: tokens and probes come without one.
fn verifier(
    path: &Path,
    pem: &[u8],
    provider: Arc<CryptoProvider>,
) -> Result<Arc<dyn rustls::server::danger::ClientCertVerifier>, String> {
    let wrong = |error: String| format!("--tls-client-ca {}: {error}", path.display());
    let mut roots = RootCertStore::empty();
    for certificate in certificates("--tls-client-ca", path, pem)? {
        roots.add(certificate).map_err(|error| wrong(error.to_string()))?;
    }
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
        .allow_unauthenticated()
        .build()
        .map_err(|error| wrong(error.to_string()))
}

fn certificates(flag: &str, path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match certificates {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        _ => Err(format!("{flag} {}: no certificate in PEM", path.display())),
    }
}

fn read(flag: &str, path: &Path) -> Result<Vec<u8>, String> {
    files::read(path, MOST_BYTES).map_err(|error| format!("{flag} {}: {error}", path.display()))
}
