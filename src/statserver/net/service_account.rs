//! What the cluster says of its front proxy: the ConfigMap
//! `kube-system/extension-apiserver-authentication`, read with the pod's service account.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use axum::body::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1;
use hyper::{Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::crypto::ring;
use rustls::pki_types::ServerName;
use serde::Deserialize;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tracing::{info, warn};

use crate::net::front_proxy::AllowedNames;
use crate::net::shutdown::DrainWatcher;
use crate::net::tls::{self, Tls};
use crate::os::files;

const CONFIG_MAP: &str = "/api/v1/namespaces/kube-system/configmaps/extension-apiserver-authentication";
/// How long one request may take in all.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The time between two requests, and the first wait after one that failed.
const PERIOD: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_secs(1);
const MAX_ANSWER_BYTES: usize = 1 << 20;
const MAX_FILE_BYTES: u64 = 1 << 20;

/// The kube-apiserver, and the folder with the pod's credentials.
#[derive(Clone, Debug)]
pub struct ServiceAccount {
    host: String,
    port: u16,
    folder: PathBuf,
}

/// What the ConfigMap says of the front proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
struct RequestHeader {
    client_ca: Vec<u8>,
    allowed_names: Vec<String>,
}

impl RequestHeader {
    fn parse(body: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct ConfigMap {
            data: Data,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "kebab-case")]
        struct Data {
            requestheader_client_ca_file: String,
            requestheader_allowed_names: Option<String>,
        }
        let ConfigMap { data } = serde_json::from_slice(body).map_err(|error| error.to_string())?;
        let names = data.requestheader_allowed_names.as_deref().unwrap_or("[]");
        let allowed_names =
            serde_json::from_str(names).map_err(|error| format!("requestheader-allowed-names: {error}"))?;
        Ok(Self { client_ca: data.requestheader_client_ca_file.into_bytes(), allowed_names })
    }

    /// Checks the CA. It comes into force together with the names, or neither does: a certificate of
    /// the CA before must not be allowed by the names after.
    fn checked(self) -> Result<Self, String> {
        if !self.client_ca.is_empty() {
            tls::roots("requestheader-client-ca-file", &self.client_ca)?;
        }
        Ok(self)
    }
}

/// What was read last, for TLS and for the names.
#[derive(Clone, Debug, Default)]
pub struct FetchedTrust {
    /// The request-header CA, in PEM; empty before it was read.
    pub client_ca: Arc<RwLock<Vec<u8>>>,
    /// The names.
    pub names: AllowedNames,
}

impl ServiceAccount {
    /// Returns the service account of this pod; `None` outside of a cluster.
    pub fn of_pod(folder: &Path, variable: impl Fn(&str) -> Option<String>) -> Option<Self> {
        let host = variable("KUBERNETES_SERVICE_HOST").filter(|host| !host.is_empty())?;
        let port = variable("KUBERNETES_SERVICE_PORT")?.parse().ok()?;
        folder.join("token").exists().then(|| Self { host, port, folder: folder.to_owned() })
    }

    /// Reads the ConfigMap again and again until the shutdown. What cannot be read, or is wrong,
    /// changes nothing; before it was read once, nobody is the front proxy.
    pub async fn follow(self, trust: FetchedTrust, tls: Arc<Tls>, drain: DrainWatcher) {
        let following = async {
            let (mut last, mut retry) = (None, RETRY);
            loop {
                let read = tokio::time::timeout(TIMEOUT, self.read()).await;
                match read.unwrap_or_else(|_| Err(format!("no answer within {TIMEOUT:?}"))) {
                    Ok(read) if last.as_ref() == Some(&read) => retry = RETRY,
                    Ok(read) => {
                        info!(names = ?read.allowed_names, "read who the front proxy is");
                        trust.names.set(read.allowed_names.clone());
                        let mut client_ca = trust.client_ca.write().unwrap_or_else(PoisonError::into_inner);
                        client_ca.clone_from(&read.client_ca);
                        drop(client_ca);
                        tls.reload();
                        (last, retry) = (Some(read), RETRY);
                    }
                    Err(reason) => {
                        warn!(
                            host = self.host,
                            port = self.port,
                            reason,
                            "cannot read ConfigMap \
                            kube-system/extension-apiserver-authentication; trying again"
                        );
                        tokio::time::sleep(retry).await;
                        retry = (retry * 2).min(PERIOD);
                        continue;
                    }
                }
                tokio::time::sleep(PERIOD).await;
            }
        };
        tokio::select! {
            () = following => {}
            () = drain.closing() => {}
        }
    }

    async fn read(&self) -> Result<RequestHeader, String> {
        // Both change while the pod runs.
        let folder = self.folder.clone();
        let read = move || {
            let read = |name: &str| {
                files::read(&folder.join(name), MAX_FILE_BYTES).map_err(|error| format!("{name}: {error}"))
            };
            Ok::<_, String>((read("token")?, read("ca.crt")?))
        };
        let (token, ca) = tokio::task::spawn_blocking(read).await.map_err(|error| error.to_string())??;
        let token = std::str::from_utf8(&token).map_err(|_| "token: not UTF-8")?.trim().to_owned();
        let server = ServerName::try_from(self.host.clone()).map_err(|error| error.to_string())?;
        let host = self.host.trim_start_matches('[').trim_end_matches(']');
        let stream = TcpStream::connect((host, self.port)).await.map_err(|error| error.to_string())?;
        let connector = TlsConnector::from(Arc::new(client_config(&ca)?));
        let stream = connector.connect(server, stream).await.map_err(|error| error.to_string())?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
        let request = Request::get(CONFIG_MAP)
            .header(header::HOST, format!("{}:{}", self.host, self.port))
            .header(header::ACCEPT, "application/json")
            .header(header::AUTHORIZATION, format!("Bearer {token}"))
            .body(Empty::<Bytes>::new())
            // Not the error, which may show the token.
            .map_err(|_| "token: not a header's value")?;
        let asking = async {
            let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await;
            let body = body.map_err(|error| error.to_string())?.to_bytes();
            match status {
                StatusCode::OK => RequestHeader::parse(&body)?.checked(),
                _ => Err(format!("the answer is {status}; expected 200")),
            }
        };
        tokio::select! {
            answer = asking => answer,
            // The connection moves the bytes; its end without an answer is an error of the request.
            () = async { let _ = connection.await; std::future::pending::<()>().await } => {
                Err("the connection ended".into())
            }
        }
    }
}

fn client_config(ca: &[u8]) -> Result<ClientConfig, String> {
    let roots = tls::roots("ca.crt", ca)?;
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_config_map_says_who_the_front_proxy_is() {
        let parse = |data: serde_json::Value| {
            RequestHeader::parse(
                serde_json::json!({"kind": "ConfigMap", "data": data}).to_string().as_bytes(),
            )
        };
        let whole = serde_json::json!({
            "client-ca-file": "other", "requestheader-client-ca-file": "PEM",
            "requestheader-allowed-names": r#"["front-proxy-client"]"#,
            "requestheader-username-headers": r#"["X-Remote-User"]"#,
        });
        let names = vec!["front-proxy-client".to_owned()];
        assert_eq!(parse(whole).unwrap(), RequestHeader { client_ca: b"PEM".into(), allowed_names: names });
        let without = serde_json::json!({"requestheader-client-ca-file": "PEM"});
        assert_eq!(parse(without).unwrap().allowed_names, Vec::<String>::new());
        assert!(parse(serde_json::json!({})).is_err(), "a cluster without aggregation");
        let wrong =
            serde_json::json!({"requestheader-client-ca-file": "PEM", "requestheader-allowed-names": "x"});
        assert!(parse(wrong).unwrap_err().starts_with("requestheader-allowed-names: "));
    }

    #[test]
    fn outside_of_a_cluster_there_is_no_service_account() {
        let folder = tempfile::tempdir().unwrap();
        let inside = |name: &str| Some(if name.ends_with("HOST") { "10.0.0.1" } else { "443" }.to_owned());
        assert!(ServiceAccount::of_pod(folder.path(), inside).is_none(), "no token is mounted");
        std::fs::write(folder.path().join("token"), "x").unwrap();
        assert!(ServiceAccount::of_pod(folder.path(), inside).is_some());
        assert!(ServiceAccount::of_pod(folder.path(), |_| None).is_none());
    }
}
