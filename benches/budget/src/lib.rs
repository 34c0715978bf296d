//! A minimal proxy-wasm host on wasmi. It counts what a module does: instructions (as fuel) and
//! host calls. It is not a mock of Envoy for tests of behaviour; those run on Envoy.

use std::collections::{BTreeMap, HashMap, VecDeque};

use wasmi::{Caller, Config, Engine, Extern, ExternType, Func, Instance, Linker, Memory, Module, Store, Val};

const OK: i32 = 0;
const NOT_FOUND: i32 = 1;
const EMPTY: i32 = 7;
const CAS_MISMATCH: i32 = 8;
/// Buffers and header maps, by proxy-wasm's numbers.
const PLUGIN_CONFIGURATION: i32 = 7;
const REQUEST_HEADERS: i32 = 0;
const RESPONSE_HEADERS: i32 = 2;
const CALL_RESPONSE_HEADERS: i32 = 6;
const PLENTY: u64 = u64::MAX / 2;

/// The host's data, and what it has observed.
#[derive(Default)]
struct State {
    configuration: Vec<u8>,
    request: Vec<(&'static str, &'static str)>,
    now_ns: u64,
    shared: HashMap<Vec<u8>, (Vec<u8>, u32)>,
    metrics: i32,
    tick_ms: i64,
    queue: VecDeque<Vec<u8>>,
    calls_made: i32,
    calls: BTreeMap<String, u32>,
}

/// Compiles a module in such a way that its instructions are counted.
///
/// # Panics
/// If the file is not wasm.
pub fn compile(path: &std::path::Path) -> Module {
    let mut config = Config::default();
    config.consume_fuel(true);
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    Module::new(&Engine::new(&config), bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A module in a VM.
pub struct Vm {
    store: Store<State>,
    instance: Instance,
    contexts: i32,
}

/// The cost of some work.
#[derive(Clone, Debug, Default)]
pub struct Cost {
    /// wasm instructions, as wasmi's fuel counts them. An instruction that copies memory counts by
    /// its length.
    pub instructions: u64,
    /// Host calls, by name.
    pub calls: BTreeMap<String, u32>,
}

impl Cost {
    /// Returns the number of all host calls.
    pub fn host_calls(&self) -> u32 {
        self.calls.values().sum()
    }
}

impl Vm {
    /// Starts a module and configures its plugin.
    ///
    /// # Panics
    /// If the module is not a proxy-wasm plugin, or refuses the configuration.
    pub fn start(module: &Module, configuration: &str) -> Self {
        let engine = module.engine();
        let state = State { configuration: configuration.into(), now_ns: 1_000_000_000, ..State::default() };
        let mut store = Store::new(engine, state);
        store.set_fuel(PLENTY).expect("fuel");
        let mut linker = Linker::new(engine);
        for import in module.imports() {
            let ExternType::Func(ty) = import.ty().clone() else { continue };
            let name = import.name().to_owned();
            let (results, label) = (ty.results().len(), name.clone());
            let f = Func::new(&mut store, ty, move |mut caller, arguments, out| {
                *caller.data_mut().calls.entry(label.clone()).or_default() += 1;
                let arguments: Vec<i64> = arguments
                    .iter()
                    .map(|v| v.i64().unwrap_or_else(|| v.i32().unwrap_or(0).into()))
                    .collect();
                let status = answer(&mut caller, &label, &arguments);
                if results == 1 {
                    out[0] = Val::I32(status);
                }
                Ok(())
            });
            linker.define(import.module(), &name, f).expect("an import");
        }
        let instance = linker.instantiate_and_start(&mut store, module).expect("an instance");
        let mut vm = Self { store, instance, contexts: 1 };
        vm.call("_initialize", &[]);
        vm.call("proxy_on_context_create", &[1, 0]);
        vm.call("proxy_on_vm_start", &[1, 0]);
        let size = i32::try_from(configuration.len()).expect("a short configuration");
        assert_eq!(vm.call("proxy_on_configure", &[1, size]), 1, "the configuration is refused");
        vm.tick();
        vm
    }

    /// Calls an export that returns a number or nothing. Returns the number, or 0.
    fn call(&mut self, name: &str, arguments: &[i32]) -> i32 {
        // As in Envoy, a missing export is not called.
        let Some(export) = self.instance.get_func(&self.store, name) else { return 0 };
        let arguments: Vec<Val> = arguments.iter().map(|a| Val::I32(*a)).collect();
        let mut results = vec![Val::I32(0); export.ty(&self.store).results().len()];
        export.call(&mut self.store, &arguments, &mut results).unwrap_or_else(|e| panic!("{name}: {e:?}"));
        results.first().and_then(Val::i32).unwrap_or(0)
    }

    /// Lets a second pass, and runs the tick.
    pub fn tick(&mut self) -> Cost {
        self.store.data_mut().now_ns += 1_000_000_000;
        self.cost(|vm| {
            vm.call("proxy_on_tick", &[1]);
        })
    }

    /// Returns the milliseconds after which the module asked for its next tick.
    pub fn next_tick_ms(&self) -> i64 {
        self.store.data().tick_ms
    }

    /// Runs one request from its headers to its end, with the response code 200.
    pub fn request(&mut self, headers: &[(&'static str, &'static str)]) -> Cost {
        self.cost(|vm| {
            let id = vm.open(headers);
            vm.close(id);
        })
    }

    /// Begins a request. Returns its context.
    pub fn open(&mut self, headers: &[(&'static str, &'static str)]) -> i32 {
        self.contexts += 1;
        let id = self.contexts;
        let state = self.store.data_mut();
        state.request = headers.to_vec();
        state.now_ns += 1_000_000;
        let count = i32::try_from(headers.len()).expect("few headers");
        self.call("proxy_on_context_create", &[id, 1]);
        self.call("proxy_on_request_headers", &[id, count, 1]);
        id
    }

    /// Ends a request with the response code 200.
    pub fn close(&mut self, id: i32) {
        self.call("proxy_on_response_headers", &[id, 3, 0]);
        self.call("proxy_on_response_body", &[id, 2, 1]);
        self.call("proxy_on_done", &[id]);
        self.call("proxy_on_log", &[id]);
        self.call("proxy_on_delete", &[id]);
    }

    /// Delivers what is in the module's queue, answers the HTTP calls that it then makes with 200, and
    /// delivers what follows from that, until nothing is left.
    pub fn deliver(&mut self) {
        while !self.store.data().queue.is_empty() || self.store.data().calls_made > 0 {
            self.store.data_mut().now_ns += 1_000_000;
            if !self.store.data().queue.is_empty() {
                self.call("proxy_on_queue_ready", &[1, 1]);
            }
            for call in 1..=std::mem::take(&mut self.store.data_mut().calls_made) {
                self.call("proxy_on_http_call_response", &[1, call, 1, 0, 0]);
            }
        }
    }

    fn cost(&mut self, work: impl FnOnce(&mut Self)) -> Cost {
        self.store.data_mut().calls.clear();
        let before = self.store.get_fuel().expect("fuel");
        work(self);
        let instructions = before - self.store.get_fuel().expect("fuel");
        Cost { instructions, calls: std::mem::take(&mut self.store.data_mut().calls) }
    }
}

fn memory(caller: &mut Caller<'_, State>) -> Memory {
    match caller.get_export("memory") {
        Some(Extern::Memory(memory)) => memory,
        _ => panic!("a module without memory"),
    }
}

fn read(caller: &mut Caller<'_, State>, address: i64, size: i64) -> Vec<u8> {
    let (address, size) = (address as usize, size as usize);
    memory(caller).data(&caller)[address..address + size].to_vec()
}

fn write(caller: &mut Caller<'_, State>, address: i64, bytes: &[u8]) {
    memory(caller).write(caller, address as usize, bytes).expect("an address");
}

/// Gives bytes to the module, in memory that the module allocates.
fn give(caller: &mut Caller<'_, State>, bytes: &[u8], data: i64, size: i64) -> i32 {
    let Some(Extern::Func(allocate)) = caller.get_export("proxy_on_memory_allocate") else {
        panic!("a module that allocates nothing");
    };
    let mut address = [Val::I32(0)];
    allocate.call(&mut *caller, &[Val::I32(bytes.len() as i32)], &mut address).expect("memory");
    let address = address[0].i32().expect("an address");
    write(caller, address.into(), bytes);
    write(caller, data, &address.to_le_bytes());
    write(caller, size, &(bytes.len() as u32).to_le_bytes());
    OK
}

fn answer(caller: &mut Caller<'_, State>, name: &str, a: &[i64]) -> i32 {
    match name {
        "clock_time_get" => {
            let now = caller.data().now_ns.to_le_bytes();
            write(caller, a[2], &now);
            OK
        }
        "proxy_get_current_time_nanoseconds" => {
            let now = caller.data().now_ns.to_le_bytes();
            write(caller, a[0], &now);
            OK
        }
        "proxy_get_header_map_value" => {
            let key = read(caller, a[1], a[2]);
            let value = match a[0] as i32 {
                REQUEST_HEADERS => {
                    caller.data().request.iter().find(|(k, _)| k.as_bytes() == key).map(|(_, v)| *v)
                }
                RESPONSE_HEADERS | CALL_RESPONSE_HEADERS if key == b":status" => Some("200"),
                _ => None,
            };
            value.map_or(NOT_FOUND, |value| give(caller, value.as_bytes(), a[3], a[4]))
        }
        "proxy_get_buffer_bytes" if a[0] as i32 == PLUGIN_CONFIGURATION => {
            let configuration = caller.data().configuration.clone();
            give(caller, &configuration, a[3], a[4])
        }
        "proxy_get_property" => match read(caller, a[0], a[1]).as_slice() {
            b"response\0code" => give(caller, &200_i64.to_le_bytes(), a[2], a[3]),
            b"xds\0cluster_name" => give(caller, b"outbound|80||hello.default.svc.cluster.local", a[2], a[3]),
            _ => NOT_FOUND,
        },
        "proxy_get_shared_data" => {
            let key = read(caller, a[0], a[1]);
            let Some((value, version)) = caller.data().shared.get(&key).cloned() else { return NOT_FOUND };
            write(caller, a[4], &version.to_le_bytes());
            give(caller, &value, a[2], a[3])
        }
        "proxy_set_shared_data" => {
            let (key, value) = (read(caller, a[0], a[1]), read(caller, a[2], a[3]));
            let version = a[4] as u32;
            let shared = &mut caller.data_mut().shared;
            let present = shared.get(&key).map(|(_, version)| *version);
            if version != 0 && present.is_some_and(|present| present != version) {
                return CAS_MISMATCH;
            }
            shared.insert(key, (value, present.unwrap_or(0) + 1));
            OK
        }
        "proxy_define_metric" => {
            caller.data_mut().metrics += 1;
            let id = caller.data().metrics.to_le_bytes();
            write(caller, a[3], &id);
            OK
        }
        "proxy_set_tick_period_milliseconds" => {
            caller.data_mut().tick_ms = a[0];
            OK
        }
        "proxy_http_call" => {
            caller.data_mut().calls_made += 1;
            let call = caller.data().calls_made.to_le_bytes();
            write(caller, a[9], &call);
            OK
        }
        "proxy_enqueue_shared_queue" => {
            let message = read(caller, a[1], a[2]);
            caller.data_mut().queue.push_back(message);
            OK
        }
        "proxy_dequeue_shared_queue" => match caller.data_mut().queue.pop_front() {
            Some(message) => give(caller, &message, a[1], a[2]),
            None => EMPTY,
        },
        "proxy_register_shared_queue" => {
            write(caller, a[2], &1_u32.to_le_bytes());
            OK
        }
        "environ_sizes_get" => {
            write(caller, a[0], &[0; 4]);
            write(caller, a[1], &[0; 4]);
            OK
        }
        _ => OK,
    }
}
