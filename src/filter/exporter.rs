//! The role `exporter`: the pod's figures at `/metrics`, read from the shared data that the pod's workers
//! keep; it counts nothing itself.

use std::rc::Rc;

use inflight_stats::Config;
use inflight_stats::exporter::{self, PROTOBUF, Route, TEXT, route};
use inflight_stats::pod::Pod;
use prost::Message;
use proxy_wasm::traits::{Context, HttpContext};
use proxy_wasm::types::Action;

use crate::host::{self, Headers, SharedData};

/// What all requests to one exporter share.
pub struct Exporter {
    pub config: Config,
    pub pod: Pod,
}

/// One request to the exporter.
pub struct Scrape(pub Rc<Exporter>);

impl Context for Scrape {}

impl HttpContext for Scrape {
    fn on_http_request_headers(&mut self, _: usize, _: bool) -> Action {
        let header = |name| host::header(Headers::Request, name);
        let (method, path) = (header(":method").unwrap_or_default(), header(":path").unwrap_or_default());
        let Exporter { config, pod } = &*self.0;
        let stat = || exporter::stat_of(&config.identity.pod, pod.state(&SharedData).ok().as_ref());
        match route(&method, &path, header("accept").as_deref()) {
            Route::Protobuf => host::respond(200, &stat().encode_to_vec(), &[("content-type", PROTOBUF)]),
            Route::Text => {
                let text = exporter::prometheus(&stat(), &config.identity);
                host::respond(200, text.as_bytes(), &[("content-type", TEXT)]);
            }
            Route::NotFound => host::respond(404, b"only /metrics is here\n", &[]),
            Route::MethodNotAllowed => host::respond(405, b"only GET and HEAD\n", &[("allow", "GET, HEAD")]),
        }
        Action::Pause
    }
}
