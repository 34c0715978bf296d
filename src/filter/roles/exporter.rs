//! The role `exporter`: the pod's figures at `/metrics`, read from the shared data that the pod's
//! workers write. The exporter itself counts nothing.

use std::rc::Rc;

use inflight_stats::Config;
use inflight_stats::exporter::{PROTOBUF, Route, TEXT, knative_stat, prometheus, route};
use inflight_stats::pod::pod_state::PodStore;
use prost::Message;
use proxy_wasm::types::Action;

use crate::host::{DETAILS, HeaderMap, Host, LocalReply};

/// The data that all requests to one exporter share.
pub struct Exporter<H> {
    pub host: H,
    pub config: Config,
    pub pod: PodStore,
}

/// One request to the exporter.
pub struct ExporterStream<H>(pub Rc<Exporter<H>>);

impl<H: Host> ExporterStream<H> {
    /// Answers the request, when its headers arrive.
    pub fn on_request_headers(&mut self) -> Action {
        let Exporter { host, config, pod } = &*self.0;
        let header = |name| host.header(HeaderMap::Request, name);
        let (method, path) = (header(":method").unwrap_or_default(), header(":path").unwrap_or_default());
        let answer = |status, body: &[u8], headers: &[(&str, &str)]| {
            host.respond(&LocalReply { status, details: DETAILS, body, headers });
        };
        let stat = || knative_stat(&config.identity.pod, pod.state(host).ok().as_ref());
        match route(&method, &path, header("accept").as_deref()) {
            Route::Protobuf => answer(200, &stat().encode_to_vec(), &[("content-type", PROTOBUF)]),
            Route::Text => {
                let text = prometheus(&stat(), &config.identity);
                answer(200, text.as_bytes(), &[("content-type", TEXT)]);
            }
            Route::NotFound => answer(404, b"only /metrics is here\n", &[]),
            Route::MethodNotAllowed => {
                answer(405, b"only GET and HEAD\n", &[("allow", "GET, HEAD")]);
            }
        }
        Action::Pause
    }
}
