//! What a test does to a world by hand.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::host::{RootSide, SimulatedHost, StreamSide};
use super::network::{Call, CallRequest};
use super::world::{CALM, Stream, World};
use crate::roles::exporter::ExporterStream;
use crate::root::{ActiveRole, Root};
use crate::vm::worker_registry::WorkerRegistry;

impl World {
    /// Returns a world in which nothing happens but what the test does, and nothing is lost.
    pub fn by_hand(seed: u64, configurations: &'static [&'static str]) -> &'static Self {
        let world = Self::start(seed, configurations, CALM);
        world.calm.set(true);
        world
    }

    /// Sends a request to a VM.
    pub fn request_to(&'static self, index: usize) {
        self.request(index, self.vms[index].borrow_mut().as_mut().unwrap(), &[]);
    }

    /// A request with headers comes to a VM. Returns the headers that it goes on with.
    pub fn request_with(&'static self, index: usize, headers: &[(&str, &str)]) -> BTreeMap<String, Vec<u8>> {
        let mut vm = self.vms[index].borrow_mut();
        let vm = vm.as_mut().unwrap();
        self.request(index, vm, headers);
        self.hosts[index].borrow().streams[&vm.streams.last().unwrap().id].headers.clone()
    }

    /// Answers the oldest request of a VM that is in the app.
    pub fn answer_at(&'static self, index: usize) {
        let mut vm = self.vms[index].borrow_mut();
        let vm = vm.as_mut().unwrap();
        let in_app = |stream: &Stream| self.hosts[index].borrow().streams[&stream.id].is_in_app;
        let at = vm.streams.iter().position(in_app).unwrap();
        let id = vm.streams[at].id;
        self.hosts[index].borrow_mut().streams.get_mut(&id).unwrap().code = Some(200);
        self.end_stream(index, vm, at);
    }

    /// The client of a VM's oldest request leaves.
    pub fn end_one_at(&'static self, index: usize) {
        self.end_stream(index, self.vms[index].borrow_mut().as_mut().unwrap(), 0);
    }

    /// The client of a VM's newest request leaves.
    pub fn end_newest_at(&'static self, index: usize) {
        let mut vm = self.vms[index].borrow_mut();
        let vm = vm.as_mut().unwrap();
        self.end_stream(index, vm, vm.streams.len() - 1);
    }

    /// Ends the requests of a VM that the filter has answered.
    pub fn end_answered_at(&'static self, index: usize) {
        self.end_answered(index, self.vms[index].borrow_mut().as_mut().unwrap());
    }

    /// Lets a VM read the messages from the others.
    pub fn read_mail_of(&'static self, index: usize) {
        self.read_mail(index, self.vms[index].borrow_mut().as_mut().unwrap());
    }

    /// Lets time pass, and runs all timers that are due then.
    pub fn pass(&'static self, ns: u64) {
        self.now_ns.set(self.now_ns.get() + ns);
        for (index, vm) in self.vms.iter().enumerate() {
            self.tick(index, vm.borrow_mut().as_mut().unwrap());
        }
    }

    /// Lets time pass in which everything that is due happens, except that requests stay in the app
    /// and that the VM `but` stalls.
    pub fn live_but(&'static self, ns: u64, but: Option<usize>) {
        let until_ns = self.now_ns.get() + ns;
        while self.now_ns.get() < until_ns {
            self.now_ns.set(self.now_ns.get() + 1_000_000);
            for (index, vm) in self.vms.iter().enumerate().filter(|(index, _)| Some(*index) != but) {
                let mut vm = vm.borrow_mut();
                let vm = vm.as_mut().unwrap();
                self.tick(index, vm);
                self.read_mail(index, vm);
                self.end_answered(index, vm);
            }
            self.deliver_all();
        }
    }

    /// Lets time pass in which everything that is due happens, except that requests stay in the app.
    pub fn live(&'static self, ns: u64) {
        self.live_but(ns, None);
    }

    /// Makes a VM panic. Another VM replaces it.
    pub fn panic(&'static self, index: usize) {
        let vm = self.vms[index].borrow_mut().take().unwrap();
        vm.workers.seal_all();
        // Whoever waited goes on: nobody could let it go later.
        let hangs = |stream: &StreamSide| !stream.is_in_app && stream.code.is_none();
        assert!(!self.hosts[index].borrow().streams.values().any(hangs), "seed {}: hangs", self.seed);
        self.forget(index, vm);
        *self.vms[index].borrow_mut() = Some(self.new_vm(index));
    }

    /// Stops a VM as by a trap. Another VM replaces it.
    pub fn trap(&'static self, index: usize) {
        let vm = self.vms[index].borrow_mut().take().unwrap();
        self.forget(index, vm);
        *self.vms[index].borrow_mut() = Some(self.new_vm(index));
    }

    /// Gives all VMs another configuration.
    pub fn reconfigure(&'static self) {
        self.generation.set(self.generation.get() + 1);
        for (index, vm) in self.vms.iter().enumerate() {
            self.configure(index, vm.borrow_mut().as_mut().unwrap());
        }
    }

    /// Ends the newest root context of each VM, in a random order of VMs. Open requests go on.
    pub fn end_newest_roots(&'static self) {
        let mut left: Vec<usize> = (0..Self::VMS).collect();
        while !left.is_empty() {
            let index = left.swap_remove(self.roll(left.len() as u64) as usize);
            let mut vm = self.vms[index].borrow_mut();
            let (id, mut root) = vm.as_mut().unwrap().roots.pop().unwrap();
            self.put_into_effect(index, id);
            root.on_done();
            self.hosts[index].borrow_mut().roots.remove(&id);
        }
    }

    /// Returns the number of reports on their way.
    pub fn reports_sent(&self) -> usize {
        let is_report = |call: &&Call| matches!(call.request, CallRequest::Report(_));
        self.sent.borrow().iter().filter(is_report).count()
    }

    /// Returns the clusters to which probes are on their way, each with the VM that sent it.
    pub fn probes_sent(&self) -> Vec<(usize, String)> {
        let sent = self.sent.borrow();
        let probe = |call: &Call| match &call.request {
            CallRequest::Probe(cluster) => Some((call.vm, cluster.clone())),
            CallRequest::Report(_) | CallRequest::AppProbe => None,
        };
        sent.iter().filter_map(probe).collect()
    }

    /// Returns the number of probes of the app that are on their way.
    pub fn app_probes_sent(&self) -> usize {
        let is_probe = |call: &&Call| matches!(call.request, CallRequest::AppProbe);
        self.sent.borrow().iter().filter(is_probe).count()
    }

    /// Delivers all calls that are on their way.
    pub fn deliver_all(&'static self) {
        while !self.sent.borrow().is_empty() {
            self.deliver();
        }
    }

    /// Returns an exporter's answer to a scrape.
    pub fn scrape(&'static self, configuration: &str) -> String {
        let (id, root) = self.root(0, configuration);
        assert!(root.1, "refused");
        let ActiveRole::Exporter(exporter) = root.0.role() else { panic!("no exporter") };
        let headers = [(":method", "GET"), (":path", "/metrics")];
        let headers = headers.map(|(name, value)| (name.to_owned(), value.as_bytes().to_vec()));
        let side = StreamSide { headers: headers.into(), ..StreamSide::default() };
        self.hosts[0].borrow_mut().streams.insert(id, side);
        self.put_into_effect(0, id);
        ExporterStream(Rc::clone(exporter)).on_request_headers();
        let side = self.hosts[0].borrow_mut().streams.remove(&id).unwrap();
        assert_eq!(side.code, Some(200));
        String::from_utf8(side.body.unwrap()).unwrap()
    }

    /// Returns whether a configuration is accepted.
    pub fn accepts(&'static self, configuration: &str) -> bool {
        self.root(1, configuration).1.1
    }

    /// Returns a root context that nothing else refers to, and whether its configuration is
    /// accepted.
    fn root(&'static self, index: usize, configuration: &str) -> (u32, (Root<SimulatedHost>, bool)) {
        let id = self.context();
        let host = SimulatedHost { vm: index, world: self };
        let side = RootSide { configuration: configuration.into(), ..RootSide::default() };
        self.hosts[index].borrow_mut().roots.insert(id, side);
        let mut root = Root::new(host, id, Rc::new(WorkerRegistry::new(host)));
        self.put_into_effect(index, id);
        let accepted = root.on_configure();
        self.hosts[index].borrow_mut().roots.remove(&id);
        (id, (root, accepted))
    }
}
