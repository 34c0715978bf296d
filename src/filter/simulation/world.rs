//! The simulated world: VMs and their streams, what happens to them, and the truth to compare with.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use inflight_stats::testing::{Dice, Map};
use proxy_wasm::types::Action;

use super::host::{HostSide, RootSide, SimulatedHost, StreamSide};
use super::network::{Call, CallRequest, Clusters, Key, Mailboxes, Pods, Server, Sums};
use crate::host::MetricKind;
use crate::roles::gateway::GatewayStream;
use crate::roles::sidecar::SidecarStream;
use crate::root::{ActiveRole, Root};
use crate::vm::worker_registry::WorkerRegistry;

/// The header by which a kubelet's probe is known.
const KUBELET: (&str, &str) = ("user-agent", "kube-probe/1.33");
/// The header of a network probe to a sidecar.
pub const NETWORK: (&str, &str) = ("k-network-probe", "queue");

/// One VM. The first is Envoy's main thread, which receives no requests.
pub struct Vm {
    pub workers: Rc<WorkerRegistry<SimulatedHost>>,
    /// The root contexts by their numbers, the newest last.
    pub roots: Vec<(u32, Root<SimulatedHost>)>,
    pub streams: Vec<Stream>,
    /// Root contexts whose `on_done` asked for more time.
    ending: Vec<u32>,
    stalled_until_ns: u64,
    /// It has ticked since it stalled last: no two stalls become one that is longer than any.
    has_ticked: bool,
    generation: usize,
}

pub struct Stream {
    pub id: u32,
    root: u32,
    since_ns: u64,
    /// The key under which the request counts. A probe has none.
    key: Option<Key>,
    /// Whether it is a probe that the sidecar may answer.
    is_network_probe: bool,
    logic: Logic,
}

enum Logic {
    Sidecar(SidecarStream<SimulatedHost>),
    Gateway(GatewayStream<SimulatedHost>),
}

/// How often something goes wrong: in one of this many steps, or never for 0.
#[derive(Clone, Copy)]
pub struct Faults {
    pub stalls: u64,
    pub longest_stall_ns: u64,
    pub panics: u64,
    pub reconfigurations: u64,
    /// Calls that cannot be made; reports, answers and messages that are lost; reports that arrive
    /// twice.
    pub network: u64,
    /// Clusters that get pods or lose them.
    pub pods: u64,
}

pub const CALM: Faults =
    Faults { stalls: 0, longest_stall_ns: 0, panics: 0, reconfigurations: 0, network: 0, pods: 0 };

pub struct World {
    pub seed: u64,
    pub map: Map,
    pub now_ns: Cell<u64>,
    pub calm: Cell<bool>,
    pub hosts: Vec<RefCell<HostSide>>,
    pub server: RefCell<Server>,
    /// What really happened, per key.
    pub truth: RefCell<Sums>,
    /// Requests that the breaker turned away, without probes.
    pub refused: Cell<u64>,
    pub timed_out: Cell<u64>,
    /// How the app answers probes.
    pub app_status: Cell<u16>,
    /// The answers that network probes got.
    pub probe_answers: RefCell<Vec<(u16, String)>>,
    pub clusters: Clusters,
    /// Requests that were paused, and those that were let through and found no pod.
    pub paused: Cell<u64>,
    pub without_pod: Cell<u64>,
    /// The key that all requests go to, if it is only one.
    pub key: Cell<Option<u64>>,
    /// By how many configurations the one that requests come to is older than the newest.
    pub to_older: Cell<usize>,
    faults: Faults,
    dice: RefCell<Dice>,
    depth: Cell<u32>,
    pub vms: Vec<RefCell<Option<Vm>>>,
    /// The number of the newest configuration.
    pub generation: Cell<usize>,
    configurations: &'static [&'static str],
    contexts: Cell<u32>,
    calls: Cell<u32>,
    pub mailboxes: Mailboxes,
    pub sent: RefCell<Vec<Call>>,
    /// Answers on their way: the call, and the answer's status.
    answers: RefCell<Vec<(Call, u16)>>,
    metrics: RefCell<Vec<(MetricKind, String, i64)>>,
}

/// Envoy's response flag of a client that disconnected.
const CLIENT_WENT_AWAY: u64 = 0x4000;

/// Returns the cluster of a key.
pub fn cluster_of(key: u64, port: u64) -> String {
    format!("outbound|{port}||key{key}.ns.svc.cluster.local")
}

impl World {
    pub const WALL_OFFSET_NS: u64 = 1_700_000_000_000_000_000;
    pub const VMS: usize = 4;

    /// Returns a running world, with each VM under the first configuration.
    pub fn start(seed: u64, configurations: &'static [&'static str], faults: Faults) -> &'static Self {
        // Leaked, because a host is a plain number and a reference.
        let world: &'static Self = Box::leak(Box::new(Self {
            seed,
            map: Map::default(),
            now_ns: Cell::new(1_000_000_000),
            calm: Cell::new(true),
            hosts: (0..Self::VMS).map(|_| RefCell::default()).collect(),
            server: RefCell::default(),
            truth: RefCell::default(),
            refused: Cell::default(),
            timed_out: Cell::default(),
            app_status: Cell::new(200),
            probe_answers: RefCell::default(),
            clusters: Clusters::default(),
            paused: Cell::default(),
            without_pod: Cell::default(),
            key: Cell::default(),
            to_older: Cell::default(),
            faults,
            dice: RefCell::new(Dice(seed)),
            depth: Cell::default(),
            vms: (0..Self::VMS).map(|_| RefCell::new(None)).collect(),
            generation: Cell::default(),
            configurations,
            contexts: Cell::default(),
            calls: Cell::default(),
            mailboxes: Mailboxes::default(),
            sent: RefCell::default(),
            answers: RefCell::default(),
            metrics: RefCell::default(),
        }));
        for index in 0..Self::VMS {
            *world.vms[index].borrow_mut() = Some(world.new_vm(index));
        }
        world.calm.set(false);
        world
    }

    /// Runs `steps` steps, each at most `longest_step_ns` after the previous one.
    pub fn run(&'static self, steps: u64, longest_step_ns: u64) {
        for _ in 0..steps {
            self.now_ns.set(self.now_ns.get() + self.roll(longest_step_ns));
            self.act();
        }
    }

    /// Lets all VMs run again, all requests end, and nothing get lost any more.
    pub fn settle(&'static self) {
        self.calm.set(true);
        self.clusters.serve();
        for _ in 0..2_000 {
            self.now_ns.set(self.now_ns.get() + 5_000_000);
            for index in 0..Self::VMS {
                let mut vm = self.vms[index].borrow_mut();
                let vm = vm.as_mut().unwrap();
                self.tick(index, vm);
                self.read_mail(index, vm);
                self.end_answered(index, vm);
                self.end_one(index, vm);
                self.end_roots(index, vm);
            }
            self.deliver();
        }
        let left: usize = self.vms.iter().map(|vm| vm.borrow().as_ref().unwrap().streams.len()).sum();
        assert_eq!(left, 0, "seed {}: a request waits for ever", self.seed);
    }

    /// Frees the memory of a world.
    pub fn end(&'static self) {
        for (index, vm) in self.vms.iter().enumerate() {
            self.forget(index, vm.borrow_mut().take().unwrap());
        }
    }

    pub fn roll(&self, sides: u64) -> u64 {
        self.dice.borrow_mut().roll(sides)
    }

    fn fails(&self, one_in: u64) -> bool {
        !self.calm.get() && one_in > 0 && self.roll(one_in) == 0
    }

    pub fn network_fails(&self) -> bool {
        self.fails(self.faults.network)
    }

    /// Returns the number of requests in the app.
    pub fn in_app(&self) -> usize {
        (0..Self::VMS).map(|index| self.in_app_at(index)).sum()
    }

    /// Returns the number of one VM's requests in the app.
    pub fn in_app_at(&self, index: usize) -> usize {
        self.hosts[index].borrow().streams.values().filter(|stream| stream.is_in_app).count()
    }

    /// Returns a stat: a counter's sum, a gauge's value, or the number of a histogram's values.
    pub fn stat(&self, prefix: &str) -> i64 {
        let metrics = self.metrics.borrow();
        metrics.iter().filter(|(_, name, _)| name.starts_with(prefix)).map(|(.., value)| value).sum()
    }

    /// Returns the names of all stats that were defined, with their kinds.
    pub fn stats(&self) -> Vec<(MetricKind, String)> {
        self.metrics.borrow().iter().map(|(kind, name, _)| (*kind, name.clone())).collect()
    }

    /// Lets other VMs act between any two accesses to the shared data.
    pub fn between(&'static self) {
        if !self.calm.get() && self.depth.get() < 2 && self.roll(40) == 0 {
            self.depth.set(self.depth.get() + 1);
            self.act();
            self.depth.set(self.depth.get() - 1);
        }
    }

    pub fn new_vm(&'static self, index: usize) -> Vm {
        let host = SimulatedHost { vm: index, world: self };
        let mut vm = Vm {
            workers: Rc::new(WorkerRegistry::new(host)),
            roots: Vec::new(),
            streams: Vec::new(),
            ending: Vec::new(),
            stalled_until_ns: 0,
            has_ticked: false,
            generation: self.generation.get(),
        };
        self.configure(index, &mut vm);
        vm
    }

    pub fn context(&self) -> u32 {
        self.contexts.set(self.contexts.get() + 1);
        self.contexts.get()
    }

    /// Adds a root context under the newest configuration.
    pub fn configure(&'static self, index: usize, vm: &mut Vm) {
        let id = self.context();
        vm.generation = self.generation.get();
        let configuration = self.configurations[vm.generation % self.configurations.len()].to_owned();
        let host = SimulatedHost { vm: index, world: self };
        let side = RootSide { configuration, due_ns: u64::MAX, ..RootSide::default() };
        self.hosts[index].borrow_mut().roots.insert(id, side);
        let mut root = Root::new(host, id, Rc::clone(&vm.workers));
        self.put_into_effect(index, id);
        assert!(root.on_configure(), "seed {}: refused", self.seed);
        vm.roots.push((id, root));
    }

    pub fn put_into_effect(&self, index: usize, context: u32) {
        self.hosts[index].borrow_mut().effective = context;
    }

    fn act(&'static self) {
        let index = self.roll(Self::VMS as u64) as usize;
        // This VM is busy: this call is in the middle of one of its callbacks.
        let Ok(mut guard) = self.vms[index].try_borrow_mut() else { return };
        let Some(vm) = guard.as_mut() else { return };
        if self.now_ns.get() < vm.stalled_until_ns {
            return;
        }
        if self.fails(self.faults.pods) {
            let all = [Pods::Serving, Pods::Serving, Pods::Gone, Pods::Refusing];
            let port = 80 + self.roll(2);
            self.clusters.set(&cluster_of(self.roll(6), port), all[self.roll(4) as usize]);
        }
        if vm.has_ticked && self.fails(self.faults.stalls) {
            vm.has_ticked = false;
            vm.stalled_until_ns = self.now_ns.get() + self.roll(self.faults.longest_stall_ns);
        } else if self.fails(self.faults.panics) {
            drop(guard);
            self.panic(index);
        } else if self.fails(self.faults.reconfigurations) {
            self.generation.set(self.generation.get() + 1);
        } else {
            match self.roll(12) {
                0 if vm.generation != self.generation.get() => self.configure(index, vm),
                1 => self.end_roots(index, vm),
                2 => self.end_answered(index, vm),
                3 | 4 => self.tick(index, vm),
                5 => self.read_mail(index, vm),
                6 | 7 => self.end_one(index, vm),
                8 | 9 if index > 0 => {
                    let is_probe = self.roll(8) == 0;
                    let probe = if self.contexts.get().is_multiple_of(2) { KUBELET } else { NETWORK };
                    self.request(index, vm, if is_probe { std::slice::from_ref(&probe) } else { &[] });
                }
                _ => {
                    drop(guard);
                    self.deliver();
                }
            }
        }
    }

    /// Drops a VM: none of its contexts is called any more, and its requests end, as far as can be
    /// known.
    pub fn forget(&self, index: usize, vm: Vm) {
        let now_ns = self.now_ns.get();
        for stream in vm.streams {
            self.count_out(stream.key.as_ref(), now_ns - stream.since_ns);
            std::mem::forget(stream.logic);
        }
        std::mem::forget(vm.roots);
        *self.hosts[index].borrow_mut() = HostSide::default();
    }

    fn count_out(&self, key: Option<&Key>, took_ns: u64) {
        if let Some(key) = key {
            self.truth.borrow_mut().entry(key.clone()).or_default().1 += u128::from(took_ns);
        }
    }

    pub fn request(&'static self, index: usize, vm: &mut Vm, headers: &[(&str, &str)]) {
        // Connections that drain bring requests to an old configuration.
        let (root_id, root) = &vm.roots[vm.roots.len() - 1 - self.to_older.get().min(vm.roots.len() - 1)];
        let id = self.context();
        // Two keys are active at a time, so that the others become idle.
        let any = || 2 * (self.now_ns.get() / 500_000_000 % 3) + self.roll(2);
        let busy = self.key.get().unwrap_or_else(any);
        let port = if self.faults.pods > 0 { 80 + self.roll(2) } else { 80 };
        let cluster = cluster_of(busy, port);
        let is_network_probe = headers.contains(&NETWORK);
        let is_probe = headers.contains(&KUBELET) || is_network_probe;
        let headers = headers.iter().map(|(name, value)| ((*name).into(), value.as_bytes().to_vec()));
        let headers = headers.collect();
        let side = StreamSide { root: *root_id, headers, cluster, ..StreamSide::default() };
        self.hosts[index].borrow_mut().streams.insert(id, side);
        self.put_into_effect(index, id);
        let (action, logic, key) = match root.role() {
            ActiveRole::Sidecar(sidecar) => {
                let mut stream = SidecarStream::new(id, Rc::clone(sidecar));
                let key = (!is_probe).then(|| ("ns".into(), "rev".into()));
                (stream.on_request_headers(), Logic::Sidecar(stream), key)
            }
            ActiveRole::Gateway(gateway) => {
                let mut stream = GatewayStream::new(id, Rc::clone(gateway));
                let action = stream.on_request_headers();
                // Only counted requests are marked.
                let side = self.hosts[index].borrow();
                let is_counted = side.streams[&id].headers.contains_key("k-proxy-request");
                (action, Logic::Gateway(stream), is_counted.then(|| ("ns".into(), format!("key{busy}"))))
            }
            ActiveRole::Exporter(_) | ActiveRole::Unconfigured => panic!("no role that counts"),
        };
        if action == Action::Continue {
            self.go_on(index);
        } else if self.hosts[index].borrow().streams[&id].code.is_none() {
            self.paused.set(self.paused.get() + 1);
        }
        if let Some(key) = &key {
            self.truth.borrow_mut().entry(key.clone()).or_default().0 += 1;
        }
        let since_ns = self.now_ns.get();
        vm.streams.push(Stream { id, root: *root_id, since_ns, key, is_network_probe, logic });
    }

    /// The request in effect goes on to its cluster.
    pub fn go_on(&self, index: usize) {
        let mut side = self.hosts[index].borrow_mut();
        let effective = side.effective;
        let Some(stream) = side.streams.get_mut(&effective) else { return };
        assert!(stream.code.is_none(), "it was answered already");
        match self.clusters.pods(&stream.cluster).flags() {
            None => stream.is_in_app = true,
            Some(flags) => (stream.code, stream.flags) = (Some(503), flags),
        }
    }

    /// Ends a request: the app has answered, or the client has disconnected.
    fn end_one(&'static self, index: usize, vm: &mut Vm) {
        if vm.streams.is_empty() {
            return;
        }
        let at = self.roll(vm.streams.len() as u64) as usize;
        let id = vm.streams[at].id;
        {
            let mut side = self.hosts[index].borrow_mut();
            let stream = side.streams.get_mut(&id).unwrap();
            if stream.code.is_some() {
                return;
            }
            // At the end no client gives up any more: a waiting request must get a permit, or time
            // out.
            if self.calm.get() && !stream.is_in_app {
                return;
            }
            let is_aborted = !stream.is_in_app || self.roll(4) == 0;
            stream.flags = if is_aborted { CLIENT_WENT_AWAY } else { 0 };
            stream.code = (!is_aborted).then_some(200);
        }
        self.end_stream(index, vm, at);
    }

    /// Ends the requests that the filter has answered.
    pub fn end_answered(&'static self, index: usize, vm: &mut Vm) {
        let answered = |stream: &Stream| self.hosts[index].borrow().streams[&stream.id].code.is_some();
        while let Some(at) = vm.streams.iter().position(answered) {
            let body = self.hosts[index].borrow().streams[&vm.streams[at].id].body.clone();
            let body = body.map(|body| String::from_utf8(body).unwrap());
            // A gateway takes it for a request.
            if vm.streams[at].is_network_probe
                && matches!(vm.streams[at].logic, Logic::Sidecar(_))
                && let Some(body) = body
            {
                let code = self.hosts[index].borrow().streams[&vm.streams[at].id].code;
                self.probe_answers.borrow_mut().push((code.unwrap(), body));
                self.end_stream(index, vm, at);
                continue;
            }
            let counter = match body.as_deref() {
                None => &self.without_pod,
                Some("pending request queue full\n") => &self.refused,
                Some("pending request queue timeout\n") => &self.timed_out,
                Some(text) if text.starts_with("too many requests held for ns/key") => &self.refused,
                Some(text) if text.starts_with("no capacity for ns/key") => &self.timed_out,
                other => panic!("answered {other:?}"),
            };
            counter.set(counter.get() + u64::from(vm.streams[at].key.is_some()));
            self.end_stream(index, vm, at);
        }
    }

    pub fn end_stream(&'static self, index: usize, vm: &mut Vm, at: usize) {
        let mut stream = vm.streams.swap_remove(at);
        self.put_into_effect(index, stream.id);
        // The request leaves the app before another request gets its permit.
        self.hosts[index].borrow_mut().streams.get_mut(&stream.id).unwrap().is_in_app = false;
        match &mut stream.logic {
            Logic::Sidecar(logic) => logic.on_log(),
            Logic::Gateway(logic) => logic.on_log(),
        }
        self.count_out(stream.key.as_ref(), self.now_ns.get() - stream.since_ns);
        drop(stream.logic);
        self.hosts[index].borrow_mut().streams.remove(&stream.id);
    }

    pub fn tick(&'static self, index: usize, vm: &mut Vm) {
        let now_ns = self.now_ns.get();
        for (id, root) in &mut vm.roots {
            let mut side = self.hosts[index].borrow_mut();
            let timer = side.roots.get_mut(id).unwrap();
            if timer.due_ns <= now_ns {
                timer.due_ns = now_ns + timer.period_ns;
                side.effective = *id;
                drop(side);
                root.on_tick();
                vm.has_ticked = true;
            }
        }
    }

    pub fn read_mail(&'static self, index: usize, vm: &mut Vm) {
        for id in self.mailboxes.waiting(index) {
            if let Some((_, root)) = vm.roots.iter_mut().find(|(root, _)| *root == id) {
                self.put_into_effect(index, id);
                root.on_queue_ready();
            }
        }
    }

    /// Ends the root contexts of replaced configurations that have no streams any more.
    fn end_roots(&'static self, index: usize, vm: &mut Vm) {
        let newest = vm.roots.last().unwrap().0;
        let Vm { roots, streams, ending, .. } = vm;
        for (id, root) in roots.iter_mut() {
            let is_used = streams.iter().any(|stream| stream.root == *id);
            if *id != newest && !is_used && !ending.contains(id) {
                self.put_into_effect(index, *id);
                if root.on_done() {
                    self.hosts[index].borrow_mut().roots.get_mut(id).unwrap().is_done = true;
                }
                ending.push(*id);
            }
        }
        let done = |id: &u32| self.hosts[index].borrow().roots[id].is_done;
        roots.retain(|(id, _)| !done(id));
        ending.retain(|id| !done(id));
        self.hosts[index].borrow_mut().roots.retain(|_, root| !root.is_done);
    }

    pub fn send(&self, vm: usize, root: u32, request: CallRequest) -> u32 {
        self.calls.set(self.calls.get() + 1);
        let number = self.calls.get();
        self.sent.borrow_mut().push(Call { number, vm, root, request });
        number
    }

    /// Delivers or loses one call, and delivers one answer.
    pub fn deliver(&'static self) {
        let taken = {
            let mut sent = self.sent.borrow_mut();
            let next = if sent.is_empty() { None } else { Some(self.roll(sent.len() as u64) as usize) };
            next.map(|next| sent.swap_remove(next))
        };
        if let Some(call) = taken {
            let is_lost = self.network_fails();
            let status = if is_lost { 504 } else { self.answer(&call.request) };
            if let CallRequest::Report(body) = &call.request
                && self.network_fails()
            {
                // The report arrives once more, and nothing waits for this answer.
                let request = CallRequest::Report(body.clone());
                self.sent.borrow_mut().push(Call { number: 0, vm: call.vm, root: 0, request });
            }
            let status = if self.network_fails() { 504 } else { status };
            self.answers.borrow_mut().push((call, status));
        }
        let Some((call, status)) = self.answers.borrow_mut().pop() else { return };
        let Ok(mut guard) = self.vms[call.vm].try_borrow_mut() else {
            self.answers.borrow_mut().insert(0, (call, status));
            return;
        };
        let Some(vm) = guard.as_mut() else { return };
        if let Some((id, root)) = vm.roots.iter_mut().find(|(id, _)| *id == call.root) {
            let mut side = self.hosts[call.vm].borrow_mut();
            (side.effective, side.call_status) = (*id, status);
            drop(side);
            root.on_http_call_response(call.number, 9);
        }
    }

    /// Returns the status of the answer to a call.
    fn answer(&self, request: &CallRequest) -> u16 {
        match request {
            CallRequest::Report(body) => self.server.borrow_mut().take(body),
            CallRequest::AppProbe => self.app_status.get(),
            CallRequest::Probe(cluster) => match self.clusters.pods(cluster) {
                Pods::Serving => 200,
                _ => 503,
            },
        }
    }

    pub fn post(&self, mailbox: u32, message: &[u8]) -> bool {
        // Some messages are lost, with or without notice.
        if self.network_fails() {
            return self.roll(2) == 0;
        }
        self.mailboxes.post(mailbox, message);
        true
    }

    pub fn define_metric(&self, kind: MetricKind, name: &str) -> u32 {
        let mut metrics = self.metrics.borrow_mut();
        let found = metrics.iter().position(|(_, defined, _)| defined == name);
        let at = found.unwrap_or_else(|| {
            metrics.push((kind, name.into(), 0));
            metrics.len() - 1
        });
        at as u32
    }

    pub fn change_metric(&self, metric: u32, change: impl FnOnce(MetricKind, i64) -> i64) {
        let (kind, _, value) = &mut self.metrics.borrow_mut()[metric as usize];
        *value = change(*kind, *value);
    }
}
