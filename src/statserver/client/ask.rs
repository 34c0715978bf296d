//! Requests to a running server.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue};
use hyper::{Method, Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use inflight_stats::protocol::key_name::KeyName;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::cli::commands::{ServerArgs, TOKEN_VARIABLE};
use crate::os::files;

/// How long one request may take in all.
const TIMEOUT: Duration = Duration::from_secs(10);
/// A list of keys has at most 8 MiB.
const MAX_ANSWER_BYTES: usize = 16 << 20;
const MAX_FILE_BYTES: u64 = 4 << 20;
/// Where Debian, Alpine and others have the CAs that the system trusts.
const SYSTEM_CAS: &str = "/etc/ssl/certs/ca-certificates.crt";
/// How much of an answer that is an error is shown, in characters.
const MAX_SHOWN: usize = 500;

/// A server, and how to speak to it.
pub struct Server {
    url: Uri,
    authorization: Option<HeaderValue>,
    tls: Option<TlsConnector>,
}

impl Server {
    /// Reads the files that the command names. Nothing is sent.
    ///
    /// # Errors
    /// In one line: a file that cannot be read, or is wrong.
    pub fn new(args: &ServerArgs, variable: impl Fn(&str) -> Option<String>) -> Result<Self, String> {
        let token = match &args.token_file {
            Some(path) => Some(token_in(path)?),
            None => variable(TOKEN_VARIABLE).filter(|token| !token.is_empty()),
        };
        let authorization = token.map(|token| {
            let value = HeaderValue::try_from(format!("Bearer {}", token.trim()));
            // Without the token, which must not be shown.
            value.map_err(|_| format!("the token has characters that no token can have ({TOKEN_VARIABLE})"))
        });
        let is_tls = args.server.scheme_str() == Some("https");
        let tls = is_tls.then(|| connector(args.cacert.as_ref())).transpose()?;
        Ok(Self { url: args.server.clone(), authorization: authorization.transpose()?, tls })
    }

    /// Returns the answer's body.
    ///
    /// # Errors
    /// In one line: what was asked, and what went wrong.
    pub async fn ask(&self, method: Method, path: &str, body: String) -> Result<String, String> {
        let url = format!("{}{path}", self.url.to_string().trim_end_matches('/'));
        let what = format!("{method} {url}");
        let asking = tokio::time::timeout(TIMEOUT, self.answer(method, &url, body));
        let answer = asking.await.unwrap_or_else(|_| Err(format!("no answer within {TIMEOUT:?}")));
        let (status, text) = answer.map_err(|reason| format!("{what}: {reason}"))?;
        if status.is_success() {
            return Ok(text);
        }
        let shown: String = text.trim_end().chars().take(MAX_SHOWN).collect();
        let advice = match status {
            StatusCode::UNAUTHORIZED => format!("; expected a token, by --token-file or {TOKEN_VARIABLE}"),
            _ => String::new(),
        };
        Err(format!("{what}: the server answered {status}: {shown}{advice}"))
    }

    async fn answer(&self, method: Method, url: &str, body: String) -> Result<(StatusCode, String), String> {
        let in_brackets = self.url.host().unwrap_or_default();
        let host = in_brackets.trim_start_matches('[').trim_end_matches(']');
        let port = self.url.port_u16().unwrap_or(if self.tls.is_some() { 443 } else { 80 });
        let stream = TcpStream::connect((host, port)).await;
        let stream =
            stream.map_err(|error| format!("cannot connect to {in_brackets} on port {port}: {error}"))?;
        let path = url.parse::<Uri>().ok().and_then(|url| url.path_and_query().cloned());
        let path = path.ok_or("not a URL")?;
        let mut request = Request::builder().method(method).uri(path.as_str());
        request = request.header(HOST, format!("{in_brackets}:{port}"));
        if let Some(authorization) = &self.authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        if !body.is_empty() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        let request = request.body(Full::from(body)).map_err(|error| error.to_string())?;
        match &self.tls {
            None => exchange(stream, request).await,
            Some(connector) => {
                let name = ServerName::try_from(host.to_owned()).map_err(|error| error.to_string())?;
                let stream = connector.connect(name, stream).await;
                exchange(stream.map_err(|error| format!("no TLS: {error}"))?, request).await
            }
        }
    }
}

/// Returns the path of a key below `/v1/key`, which takes names that no path can have.
pub fn path_of(key: &KeyName, below: &str) -> String {
    let query = form_urlencoded::Serializer::new(String::new())
        .append_pair("namespace", &key.namespace)
        .append_pair("name", &key.name)
        .finish();
    format!("/v1/key{below}?{query}")
}

async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    request: Request<Full<Bytes>>,
) -> Result<(StatusCode, String), String> {
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
    let asking = async {
        let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await;
        let body = body.map_err(|error| error.to_string())?.to_bytes();
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    };
    tokio::select! {
        answer = asking => answer,
        // The connection moves the bytes; its end without an answer is an error of the request.
        () = async { let _ = connection.await; std::future::pending::<()>().await } => {
            Err("the connection ended".into())
        }
    }
}

/// Returns the first token of a file: the first word of the first line that is no comment. So the
/// server's own file will do.
fn token_in(path: &Path) -> Result<String, String> {
    let invalid = |reason: String| format!("--token-file {}: {reason}", path.display());
    let bytes = files::read(path, MAX_FILE_BYTES).map_err(|error| invalid(error.to_string()))?;
    let text = std::str::from_utf8(&bytes).map_err(|_| invalid("not UTF-8".into()))?;
    let mut lines = text.lines().map(str::trim).filter(|line| !line.starts_with('#'));
    let token = lines.find_map(|line| line.split_whitespace().next());
    token.map(str::to_owned).ok_or_else(|| invalid("no token in it".into()))
}

fn connector(cacert: Option<&PathBuf>) -> Result<TlsConnector, String> {
    let (name, path) = match cacert {
        Some(path) => (format!("--cacert {}", path.display()), path.clone()),
        None => (format!("{SYSTEM_CAS} (--cacert names another file)"), SYSTEM_CAS.into()),
    };
    let pem = files::read(&path, MAX_FILE_BYTES).map_err(|error| format!("{name}: {error}"))?;
    let mut roots = RootCertStore::empty();
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let certificates = certificates.unwrap_or_default();
    let (added, _) = roots.add_parsable_certificates(certificates);
    if added == 0 {
        return Err(format!("{name}: expected CA certificates in PEM"));
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsConnector::from(Arc::new(config)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_is_the_first_word_of_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        for (text, token) in [
            ("secret\n", Some("secret")),
            ("# ours\n\nfirst shop admin\nsecond *\n", Some("first")),
            ("#\n", None),
        ] {
            std::fs::write(&file, text).unwrap();
            assert_eq!(token_in(&file).ok().as_deref(), token, "{text}");
        }
    }

    #[test]
    fn names_that_no_path_can_have_are_in_the_query() {
        let path = path_of(&KeyName::new("ns", "a/../b?c d"), "/settings");
        assert_eq!(path, "/v1/key/settings?namespace=ns&name=a%2F..%2Fb%3Fc+d");
    }
}
