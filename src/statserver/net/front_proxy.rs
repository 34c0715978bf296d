//! Whether a client is Kubernetes' front proxy: the kube-apiserver, which has authenticated and
//! authorized a user and passes the request on.

use std::sync::{Arc, PoisonError, RwLock};

use axum::http::HeaderMap;
use rustls::pki_types::CertificateDer;

use crate::net::common_name::common_name;
use crate::net::tls::Tls;

/// The header in which the front proxy names the user.
const REMOTE_USER: &str = "x-remote-user";

/// The certificates that a client has shown, its own first.
#[derive(Clone, Debug)]
pub struct ClientCertificates(pub Arc<[CertificateDer<'static>]>);

/// Common names that are allowed; if there are none, all are, as in Kubernetes.
#[derive(Clone, Debug, Default)]
pub struct AllowedNames(Arc<RwLock<Vec<String>>>);

impl AllowedNames {
    /// These names.
    pub fn new(names: Vec<String>) -> Self {
        Self(Arc::new(RwLock::new(names)))
    }

    /// Replaces them.
    pub fn set(&self, names: Vec<String>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = names;
    }

    fn allow(&self, name: Option<&str>) -> bool {
        let names = self.0.read().unwrap_or_else(PoisonError::into_inner);
        names.is_empty() || name.is_some_and(|name| names.iter().any(|allowed| allowed == name))
    }
}

/// Why a client is not the front proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotFrontProxy {
    /// It has shown no certificate of the CA.
    NoCertificate,
    /// The certificate is no longer good: it has ended, or the CA has changed.
    NotVerified,
    /// The certificate's name is not allowed.
    NotAllowed,
    /// It does not say who asks.
    NoUser,
}

impl NotFrontProxy {
    /// Returns the reason in words.
    pub fn reason(self) -> &'static str {
        match self {
            Self::NoCertificate => "no client certificate of the request-header CA",
            Self::NotVerified => "the client certificate is not of the request-header CA, or has ended",
            Self::NotAllowed => "the common name of the client certificate is not allowed",
            Self::NoUser => "no X-Remote-User header",
        }
    }
}

/// Knows the front proxy by its certificate.
pub struct FrontProxy {
    tls: Arc<Tls>,
    names: AllowedNames,
}

impl FrontProxy {
    /// Known by a certificate that the client CA of `tls` signed, with one of these names.
    pub fn new(tls: Arc<Tls>, names: AllowedNames) -> Self {
        Self { tls, names }
    }

    /// Checks a request. The certificate is verified each time: a connection may be older than a
    /// change of the CA. Without it no header means anything.
    ///
    /// # Errors
    /// [`NotFrontProxy`].
    pub fn check(
        &self,
        certificates: Option<&ClientCertificates>,
        headers: &HeaderMap,
    ) -> Result<(), NotFrontProxy> {
        let ClientCertificates(certificates) = certificates.ok_or(NotFrontProxy::NoCertificate)?;
        if !self.tls.verify_client(certificates) {
            return Err(NotFrontProxy::NotVerified);
        }
        let name = certificates.first().and_then(|certificate| common_name(certificate));
        if !self.names.allow(name.as_deref()) {
            return Err(NotFrontProxy::NotAllowed);
        }
        let user = headers.get(REMOTE_USER).is_some_and(|user| !user.is_empty());
        if user { Ok(()) } else { Err(NotFrontProxy::NoUser) }
    }
}
