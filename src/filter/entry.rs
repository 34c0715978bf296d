//! The entry: proxy-wasm's contexts as Envoy calls them. Each passes its callbacks on to the type
//! that does the work.

use std::rc::Rc;

use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::{Action, ContextType, LogLevel};

use crate::host::envoy::Envoy;
use crate::panic_hook;
use crate::roles::exporter::ExporterStream;
use crate::roles::gateway::GatewayStream;
use crate::roles::sidecar::SidecarStream;
use crate::root::{ActiveRole, Root};
use crate::vm::worker_registry::WorkerRegistry;

thread_local! {
    static WORKERS: Rc<WorkerRegistry<Envoy>> = Rc::new(WorkerRegistry::new(Envoy));
}

proxy_wasm::main! {{
    // Envoy filters its component `wasm`, too. This level only avoids formatting traces.
    proxy_wasm::set_log_level(LogLevel::Info);
    panic_hook::install(|| WORKERS.with(|workers| workers.seal_all()));
    proxy_wasm::set_root_context(|id| Box::new(Root::new(Envoy, id, WORKERS.with(Rc::clone))));
}}

impl Context for Root<Envoy> {
    fn on_http_call_response(&mut self, call: u32, _: usize, body_bytes: usize, _: usize) {
        Root::on_http_call_response(self, call, body_bytes);
    }

    fn on_done(&mut self) -> bool {
        Root::on_done(self)
    }
}

impl RootContext for Root<Envoy> {
    fn on_configure(&mut self, _: usize) -> bool {
        Root::on_configure(self)
    }

    fn on_tick(&mut self) {
        Root::on_tick(self);
    }

    fn on_queue_ready(&mut self, _: u32) {
        Root::on_queue_ready(self);
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }

    fn create_http_context(&self, id: u32) -> Option<Box<dyn HttpContext>> {
        Some(match self.role() {
            ActiveRole::Sidecar(sidecar) => Box::new(SidecarStream::new(id, Rc::clone(sidecar))),
            ActiveRole::Gateway(gateway) => Box::new(GatewayStream::new(id, Rc::clone(gateway))),
            ActiveRole::Exporter(exporter) => Box::new(ExporterStream(Rc::clone(exporter))),
            // A stream that begins before any configuration. For `None` the SDK would panic.
            ActiveRole::Unconfigured => Box::new(Uncounted),
        })
    }
}

impl Context for SidecarStream<Envoy> {}

impl HttpContext for SidecarStream<Envoy> {
    fn on_http_request_headers(&mut self, _: usize, _: bool) -> Action {
        #[cfg(feature = "fault-injection")]
        crate::fault_injection::on_request(Envoy);
        self.on_request_headers()
    }

    fn on_log(&mut self) {
        SidecarStream::on_log(self);
    }
}

impl Context for GatewayStream<Envoy> {}

impl HttpContext for GatewayStream<Envoy> {
    fn on_http_request_headers(&mut self, _: usize, _: bool) -> Action {
        #[cfg(feature = "fault-injection")]
        crate::fault_injection::on_request(Envoy);
        self.on_request_headers()
    }

    fn on_log(&mut self) {
        GatewayStream::on_log(self);
    }
}

impl Context for ExporterStream<Envoy> {}

impl HttpContext for ExporterStream<Envoy> {
    fn on_http_request_headers(&mut self, _: usize, _: bool) -> Action {
        self.on_request_headers()
    }
}

struct Uncounted;

impl Context for Uncounted {}

impl HttpContext for Uncounted {}
