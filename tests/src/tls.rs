//! A certificate authority for tests, and a client that trusts it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::Full;
use hyper::{Request, Response, StatusCode};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::http;

/// An authority that signs certificates for 127.0.0.1.
#[derive(Debug)]
pub struct Authority {
    /// Its own certificate in PEM.
    pub pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its key, each in a file.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The certificate in PEM.
    pub certificate: PathBuf,
    /// The key in PEM.
    pub key: PathBuf,
}

impl Authority {
    /// Returns a new authority.
    ///
    /// # Panics
    /// If it cannot be created.
    pub fn new() -> Self {
        let mut params = CertificateParams::new([]).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let pem = params.self_signed(&key).expect("a certificate").pem();
        Self { pem, issuer: Issuer::new(params, key) }
    }

    /// Signs a certificate, and writes it and its key to `folder`.
    ///
    /// # Panics
    /// If it cannot be created or written.
    pub fn issue(&self, folder: &Path, name: &str) -> Identity {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(["127.0.0.1".to_owned()]).expect("an address");
        // A certificate with its issuer's name would be taken for a self-signed one.
        params.distinguished_name.push(DnType::CommonName, name);
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        let identity = Identity {
            certificate: folder.join(format!("{name}.pem")),
            key: folder.join(format!("{name}.key")),
        };
        std::fs::write(&identity.certificate, certificate.pem()).expect("a file");
        std::fs::write(&identity.key, key.serialize_pem()).expect("a file");
        identity
    }

    /// Returns a client that trusts this authority, and presents a certificate if it has one.
    ///
    /// # Panics
    /// If a file is not valid.
    pub fn client(&self, identity: Option<&Identity>) -> Client {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.pem.as_bytes()).expect("PEM")).expect("a certificate");
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots);
        let config = match identity {
            None => builder.with_no_client_auth(),
            Some(Identity { certificate, key }) => {
                let certificate = CertificateDer::from_pem_file(certificate).expect("PEM");
                let key = PrivateKeyDer::from_pem_file(key).expect("PEM");
                builder.with_client_auth_cert(vec![certificate], key).expect("a certificate with its key")
            }
        };
        Client(TlsConnector::from(Arc::new(config)))
    }
}

impl Default for Authority {
    fn default() -> Self {
        Self::new()
    }
}

impl Identity {
    /// Returns what a server shakes hands with that shows this certificate.
    ///
    /// # Panics
    /// If a file is not valid.
    pub fn acceptor(&self) -> TlsAcceptor {
        let certificate = CertificateDer::from_pem_file(&self.certificate).expect("PEM");
        let key = PrivateKeyDer::from_pem_file(&self.key).expect("PEM");
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)
            .expect("a certificate with its key");
        TlsAcceptor::from(Arc::new(config))
    }
}

/// A client that speaks TLS.
#[derive(Clone)]
pub struct Client(TlsConnector);

impl Client {
    /// Sends a request on a connection of its own and reads the whole answer.
    ///
    /// # Errors
    /// What went wrong, in words.
    pub async fn ask(
        &self,
        to: SocketAddr,
        request: Request<Full<Bytes>>,
    ) -> Result<(StatusCode, String), String> {
        let (head, body) = self.answer(to, request).await?.into_parts();
        Ok((head.status, String::from_utf8_lossy(&body).into_owned()))
    }

    /// The same with the headers of the answer.
    ///
    /// # Errors
    /// What went wrong, in words.
    pub async fn answer(
        &self,
        to: SocketAddr,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<Bytes>, String> {
        http::answer_over(self.connect(to).await?, request).await
    }

    /// Opens a connection.
    ///
    /// # Errors
    /// What went wrong, in words.
    pub async fn connect(&self, to: SocketAddr) -> Result<TlsStream<TcpStream>, String> {
        let stream = TcpStream::connect(to).await.map_err(|e| e.to_string())?;
        self.0.connect(ServerName::from(to.ip()), stream).await.map_err(|e| e.to_string())
    }

    /// GETs a path.
    ///
    /// # Errors
    /// What went wrong, in words.
    ///
    /// # Panics
    /// If the path is not valid.
    pub async fn get(&self, from: SocketAddr, path: &str) -> Result<(StatusCode, String), String> {
        let request = Request::get(path).header("host", "test").body(Full::default()).expect("a request");
        self.ask(from, request).await
    }
}
