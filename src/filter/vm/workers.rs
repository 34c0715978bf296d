//! The workers of one VM, by the pods that they count for.

use std::cell::RefCell;
use std::rc::Rc;

use inflight_stats::Config;
use inflight_stats::pod::pod_state::PodStore;
use inflight_stats::pod::store::StoreError;

use crate::host::Host;
use crate::vm::config_stack::period_ns;
use crate::vm::worker::Worker;

/// The context to go back to where nothing is called any more.
const NO_CONTEXT: u32 = 0;

/// A worker, shared by the contexts of its VM.
pub type SharedWorker<H> = Rc<RefCell<Worker<H>>>;

/// All workers of one VM, by domain ([`Config::domain`]).
pub struct Workers<H> {
    host: H,
    by_domain: RefCell<Vec<(String, SharedWorker<H>)>>,
}

impl<H: Host> Workers<H> {
    /// None yet.
    pub const fn new(host: H) -> Self {
        Self { host, by_domain: RefCell::new(Vec::new()) }
    }

    /// Returns the worker of the pod that this root context is configured for, new or as it is.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn of(&self, root: u32, config: &Config) -> Result<SharedWorker<H>, StoreError> {
        let domain = config.domain();
        let (now, wall_ns) = (self.host.monotonic(), self.host.wall_ns());
        let pod = PodStore::new(&domain);
        let incarnation = wall_ns ^ now.0.rotate_left(32);
        let state = pod.open(&self.host, now, wall_ns, period_ns(config), incarnation)?;
        if let Some(worker) = self.find(&domain) {
            if let Ok(mut worker) = worker.try_borrow_mut() {
                worker.join(root, config, &state)?;
            }
            return Ok(worker);
        }
        let mut worker = Worker::new(self.host, config, pod, &state, now);
        worker.join(root, config, &state)?;
        let worker = Rc::new(RefCell::new(worker));
        if let Ok(mut by_domain) = self.by_domain.try_borrow_mut() {
            by_domain.push((domain, Rc::clone(&worker)));
        }
        Ok(worker)
    }

    fn find(&self, domain: &str) -> Option<SharedWorker<H>> {
        let by_domain = self.by_domain.try_borrow().ok()?;
        by_domain.iter().find(|(name, _)| name == domain).map(|(_, worker)| Rc::clone(worker))
    }

    /// The VM panics: leaves everything counted to the others, and lets requests that wait go on.
    /// Nobody could ever do that later, and they share the fate of those that are in the app
    /// already. Only a worker that was being changed at that very moment keeps to its last tick.
    pub fn seal_all(&self) {
        for (_, worker) in self.by_domain.try_borrow().iter().flat_map(|workers| workers.iter()) {
            if let Ok(mut worker) = worker.try_borrow_mut() {
                let waiting = worker.close_breaker();
                worker.seal();
                drop(worker);
                self.host.resume(&waiting, NO_CONTEXT);
            }
        }
    }
}
