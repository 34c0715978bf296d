//! What is around the VMs: clusters with and without pods, the stats server, calls on their way, and
//! the messages between VMs.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};

use inflight_stats::protocol::report_delta::addition;
use inflight_stats::{Report, Snapshot};

/// A namespace and a name.
pub type Key = (String, String);

/// The number of requests, and the time that they took.
pub type Sums = BTreeMap<Key, (u64, u128)>;

/// What is behind the name of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pods {
    /// Pods that answer.
    Serving,
    /// No endpoint.
    Gone,
    /// An endpoint that refuses connections.
    Refusing,
    /// Envoy has no such cluster.
    Unknown,
}

impl Pods {
    /// Returns Envoy's response flags of a request that found no pod.
    pub fn flags(self) -> Option<u64> {
        match self {
            Self::Serving => None,
            Self::Gone => Some(0x2),
            Self::Refusing => Some(0x20),
            Self::Unknown => Some(0x200_0000),
        }
    }
}

/// All clusters. Those that were never set serve.
#[derive(Default)]
pub struct Clusters(RefCell<BTreeMap<String, Pods>>);

impl Clusters {
    pub fn pods(&self, cluster: &str) -> Pods {
        self.0.borrow().get(cluster).copied().unwrap_or(Pods::Serving)
    }

    pub fn set(&self, cluster: &str, pods: Pods) {
        self.0.borrow_mut().insert(cluster.into(), pods);
    }

    /// All clusters serve from now on.
    pub fn serve(&self) {
        self.0.borrow_mut().clear();
    }
}

/// A call on its way.
pub struct Call {
    pub number: u32,
    pub vm: usize,
    pub root: u32,
    pub request: CallRequest,
}

pub enum CallRequest {
    Report(Vec<u8>),
    /// A probe of the hold, to a cluster.
    Probe(String),
    /// A sidecar's probe of its app.
    AppProbe,
}

/// What the stats server has accepted.
#[derive(Default)]
pub struct Server {
    known: BTreeMap<Key, Snapshot>,
    pub counted: Sums,
    pub taken: u64,
    /// The most keys that a report may have; 0 for any number.
    pub max_keys: usize,
}

impl Server {
    /// Returns the status of its answer.
    pub fn take(&mut self, bytes: &[u8]) -> u16 {
        let report = Report::decode(bytes).unwrap();
        if self.max_keys > 0 && report.messages.len() > self.max_keys {
            return 413;
        }
        for message in report.messages {
            let key = (message.namespace, message.name);
            let known = self.known.get(&key).copied();
            let period =
                addition(known.as_ref(), &message.since, &message.until).expect("no counter went back");
            let sum = self.counted.entry(key.clone()).or_default();
            *sum = (sum.0 + period.requests, sum.1 + period.request_ns);
            self.known.insert(key, known.map_or(message.until, |known| known.ceiling(&message.until)));
        }
        self.taken += 1;
        202
    }
}

/// The mailboxes of all VMs. A mailbox calls the root context that registered it last.
#[derive(Default)]
pub struct Mailboxes(RefCell<Vec<Queue>>);

#[derive(Default)]
struct Queue {
    name: String,
    vm: usize,
    root: u32,
    messages: VecDeque<Vec<u8>>,
}

impl Mailboxes {
    pub fn register(&self, name: &str, vm: usize, root: u32) -> u32 {
        let mut queues = self.0.borrow_mut();
        let found = queues.iter().position(|queue| queue.name == name);
        let at = found.unwrap_or_else(|| {
            queues.push(Queue { name: name.into(), ..Queue::default() });
            queues.len() - 1
        });
        (queues[at].vm, queues[at].root) = (vm, root);
        at as u32
    }

    pub fn post(&self, mailbox: u32, message: &[u8]) {
        if let Some(queue) = self.0.borrow_mut().get_mut(mailbox as usize) {
            queue.messages.push_back(message.into());
        }
    }

    pub fn next(&self, mailbox: u32) -> Option<Vec<u8>> {
        self.0.borrow_mut().get_mut(mailbox as usize)?.messages.pop_front()
    }

    /// Returns the root contexts of a VM for which there are messages.
    pub fn waiting(&self, vm: usize) -> Vec<u32> {
        let queues = self.0.borrow();
        let waiting = queues.iter().filter(|queue| queue.vm == vm && !queue.messages.is_empty());
        waiting.map(|queue| queue.root).collect()
    }
}
