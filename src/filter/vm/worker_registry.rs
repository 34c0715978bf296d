//! The workers of one VM, one for each pod that the VM counts for.

use std::cell::RefCell;
use std::rc::Rc;

use inflight_stats::Config;
use inflight_stats::pod::pod_state::PodStore;
use inflight_stats::pod::store::StoreError;

use crate::host::Host;
use crate::vm::config_stack::period_ns;
use crate::vm::worker::Worker;

/// The context to return to when the VM is not called again.
const NO_CONTEXT: u32 = 0;

/// A worker that the contexts of its VM share.
pub type SharedWorker<H> = Rc<RefCell<Worker<H>>>;

/// All workers of one VM, by domain ([`Config::domain`]).
pub struct WorkerRegistry<H> {
    host: H,
    by_domain: RefCell<Vec<(String, SharedWorker<H>)>>,
}

impl<H: Host> WorkerRegistry<H> {
    /// Returns an empty list of workers.
    pub const fn new(host: H) -> Self {
        Self { host, by_domain: RefCell::new(Vec::new()) }
    }

    /// Returns the worker of the pod for which this root context is configured: a new one, or the
    /// existing one.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn worker_for(&self, root: u32, config: &Config) -> Result<SharedWorker<H>, StoreError> {
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

    /// Called when the VM panics: leaves everything counted to the other workers, and lets waiting
    /// requests go on. No one could resume them later, and this way they share the fate of the
    /// requests that are already in the app. Only a worker that was being changed at that very
    /// moment keeps to its last tick.
    pub fn seal_all(&self) {
        for (_, worker) in self.by_domain.try_borrow().iter().flat_map(|workers| workers.iter()) {
            if let Ok(mut worker) = worker.try_borrow_mut() {
                let waiting = worker.close_queues();
                worker.seal();
                drop(worker);
                self.host.resume(&waiting, NO_CONTEXT);
            }
        }
    }
}
