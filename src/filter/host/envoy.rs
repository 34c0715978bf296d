//! Envoy as the [`Host`]. The SDK's wrappers panic on any status that they do not expect (and on a
//! header that is not UTF-8). Here every failure is a value.

use std::ptr::null_mut;

use inflight_stats::counting::time::MonotonicNs;
use inflight_stats::pod::store::{Expect, Store};

use proxy_wasm::types::Status;

use crate::host::{CallError, HeaderMap, Host, HttpCall, LocalReply, Mailbox, MetricKind};

const OK: u32 = 0;
/// Buffers, by proxy-wasm's numbers.
const CALL_RESPONSE_BODY: u32 = 4;
const PLUGIN_CONFIGURATION: u32 = 7;

#[link(wasm_import_module = "env")]
unsafe extern "C" {
    fn proxy_get_current_time_nanoseconds(time: *mut u64) -> u32;
    fn proxy_set_tick_period_milliseconds(period: u32) -> u32;
    fn proxy_done() -> u32;
    fn proxy_get_header_map_value(
        map: u32,
        key: *const u8,
        key_size: usize,
        value: *mut *mut u8,
        value_size: *mut usize,
    ) -> u32;
    fn proxy_replace_header_map_value(
        map: u32,
        key: *const u8,
        key_size: usize,
        value: *const u8,
        value_size: usize,
    ) -> u32;
    fn proxy_remove_header_map_value(map: u32, key: *const u8, key_size: usize) -> u32;
    fn proxy_get_buffer_bytes(
        buffer: u32,
        start: usize,
        max_size: usize,
        data: *mut *mut u8,
        size: *mut usize,
    ) -> u32;
    fn proxy_get_property(
        path: *const u8,
        path_size: usize,
        value: *mut *mut u8,
        value_size: *mut usize,
    ) -> u32;
    fn proxy_get_shared_data(
        key: *const u8,
        key_size: usize,
        value: *mut *mut u8,
        value_size: *mut usize,
        cas: *mut u32,
    ) -> u32;
    fn proxy_set_shared_data(
        key: *const u8,
        key_size: usize,
        value: *const u8,
        value_size: usize,
        cas: u32,
    ) -> u32;
    fn proxy_register_shared_queue(name: *const u8, name_size: usize, id: *mut u32) -> u32;
    fn proxy_enqueue_shared_queue(id: u32, value: *const u8, value_size: usize) -> u32;
    fn proxy_dequeue_shared_queue(id: u32, value: *mut *mut u8, value_size: *mut usize) -> u32;
    fn proxy_set_effective_context(context: u32) -> u32;
    fn proxy_continue_stream(stream: u32) -> u32;
    fn proxy_send_local_response(
        status: u32,
        details: *const u8,
        details_size: usize,
        body: *const u8,
        body_size: usize,
        headers: *const u8,
        headers_size: usize,
        grpc_status: i32,
    ) -> u32;
    fn proxy_define_metric(kind: u32, name: *const u8, name_size: usize, id: *mut u32) -> u32;
    fn proxy_record_metric(id: u32, value: u64) -> u32;
    fn proxy_increment_metric(id: u32, offset: i64) -> u32;
}

#[link(wasm_import_module = "wasi_snapshot_preview1")]
unsafe extern "C" {
    fn clock_time_get(clock: u32, precision: u64, time: *mut u64) -> u32;
}

/// Envoy, from inside one of its VMs.
#[derive(Clone, Copy, Debug)]
pub struct Envoy;

/// Takes ownership of bytes that the host allocated in this module's memory.
///
/// # Safety
/// `data` is null, or was allocated by this module's allocator with exactly `size` bytes.
unsafe fn owned(data: *mut u8, size: usize) -> Vec<u8> {
    if data.is_null() {
        return Vec::new();
    }
    // SAFETY: as above.
    unsafe { Vec::from_raw_parts(data, size, size) }
}

fn buffer(buffer: u32, max_bytes: usize) -> Vec<u8> {
    let (mut data, mut size) = (null_mut(), 0);
    // SAFETY: the host writes its own allocation through valid pointers.
    unsafe {
        match proxy_get_buffer_bytes(buffer, 0, max_bytes, &mut data, &mut size) {
            OK => owned(data, size),
            _ => Vec::new(),
        }
    }
}

/// Serializes a header map as proxy-wasm does: the count, all lengths, then names and values, each
/// followed by a zero byte.
fn serialized(headers: &[(&str, &str)]) -> Vec<u8> {
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX).to_le_bytes();
    let mut bytes = number(headers.len()).to_vec();
    for (name, value) in headers {
        bytes.extend(number(name.len()));
        bytes.extend(number(value.len()));
    }
    for (name, value) in headers {
        bytes.extend(name.bytes().chain([0]).chain(value.bytes()).chain([0]));
    }
    bytes
}

impl Host for Envoy {
    /// proxy-wasm itself offers only the wall clock. On a host without WASI's clock this returns
    /// the wall clock; the pod's clock then limits its steps.
    fn monotonic(self) -> MonotonicNs {
        const MONOTONIC: u32 = 1;
        let mut time = 0;
        // SAFETY: the host writes eight bytes at a valid, aligned address.
        match unsafe { clock_time_get(MONOTONIC, 1, &mut time) } {
            OK => MonotonicNs(time),
            _ => MonotonicNs(self.wall_ns()),
        }
    }

    fn wall_ns(self) -> u64 {
        let mut time = 0;
        // SAFETY: the host writes eight bytes at a valid, aligned address.
        unsafe { proxy_get_current_time_nanoseconds(&mut time) };
        time
    }

    fn tick_in(self, milliseconds: u64) {
        // 0 would disable the timer.
        let period = u32::try_from(milliseconds).unwrap_or(u32::MAX).max(1);
        // SAFETY: the call passes no pointers.
        if unsafe { proxy_set_tick_period_milliseconds(period) } != OK {
            log::error!("inflight: the host refused a tick period of {period} ms");
        }
    }

    fn plugin_configuration(self) -> Vec<u8> {
        buffer(PLUGIN_CONFIGURATION, usize::MAX)
    }

    fn environment(self, name: &str) -> Option<String> {
        std::env::var(name).ok()
    }

    fn set_effective_context(self, context: u32) -> bool {
        // SAFETY: the call passes no pointers.
        unsafe { proxy_set_effective_context(context) == OK }
    }

    fn complete_done(self) {
        // SAFETY: the call passes no pointers. For a context that is not about to end it returns
        // NotFound, which does no harm.
        unsafe { proxy_done() };
    }

    fn header(self, map: HeaderMap, name: &str) -> Option<Vec<u8>> {
        let (mut data, mut size) = (null_mut(), 0);
        // SAFETY: the host reads the name and writes its own allocation through valid pointers.
        unsafe {
            let status =
                proxy_get_header_map_value(map as u32, name.as_ptr(), name.len(), &mut data, &mut size);
            (status == OK).then(|| owned(data, size))
        }
    }

    fn set_header(self, map: HeaderMap, name: &str, value: &[u8]) {
        // SAFETY: the host reads the name and the value.
        unsafe {
            proxy_replace_header_map_value(
                map as u32,
                name.as_ptr(),
                name.len(),
                value.as_ptr(),
                value.len(),
            );
        }
    }

    fn remove_header(self, map: HeaderMap, name: &str) {
        // SAFETY: the host reads the name.
        unsafe {
            proxy_remove_header_map_value(map as u32, name.as_ptr(), name.len());
        }
    }

    fn property(self, path: &str) -> Option<Vec<u8>> {
        let (mut data, mut size) = (null_mut(), 0);
        // SAFETY: as in `header`.
        unsafe {
            let status = proxy_get_property(path.as_ptr(), path.len(), &mut data, &mut size);
            (status == OK && !data.is_null()).then(|| owned(data, size))
        }
    }

    fn continue_request(self) {
        const REQUEST: u32 = 0;
        // SAFETY: the call passes no pointers.
        unsafe {
            proxy_continue_stream(REQUEST);
        }
    }

    fn respond(self, reply: &LocalReply) {
        const NO_GRPC_STATUS: i32 = -1;
        let LocalReply { status, details, body, headers } = reply;
        let headers = serialized(headers);
        // SAFETY: the host reads the four buffers.
        unsafe {
            proxy_send_local_response(
                *status,
                details.as_ptr(),
                details.len(),
                body.as_ptr(),
                body.len(),
                headers.as_ptr(),
                headers.len(),
                NO_GRPC_STATUS,
            );
        }
    }

    /// Goes through the SDK, which passes the answer to the context that made the call.
    fn http_call(self, call: HttpCall) -> Result<u32, CallError> {
        let HttpCall { cluster, headers, body, timeout } = call;
        proxy_wasm::hostcalls::dispatch_http_call(cluster, headers, Some(body), vec![], timeout).map_err(
            |status| match status {
                Status::BadArgument => CallError::UnknownCluster,
                _ => CallError::NoHost,
            },
        )
    }

    fn call_response_body(self, max_bytes: usize) -> Vec<u8> {
        buffer(CALL_RESPONSE_BODY, max_bytes)
    }

    fn mailbox(self, name: &str) -> Mailbox {
        let mut id = 0;
        // SAFETY: the host reads the name and writes four bytes at a valid address.
        let status = unsafe { proxy_register_shared_queue(name.as_ptr(), name.len(), &mut id) };
        if status == OK { Mailbox(id) } else { Mailbox::NONE }
    }

    fn send_message(self, mailbox: Mailbox, message: &[u8]) -> bool {
        // SAFETY: the host reads the message.
        unsafe { proxy_enqueue_shared_queue(mailbox.0, message.as_ptr(), message.len()) == OK }
    }

    fn next_message(self, mailbox: Mailbox) -> Option<Vec<u8>> {
        let (mut data, mut size) = (null_mut(), 0);
        // SAFETY: as in `header`.
        unsafe {
            let status = proxy_dequeue_shared_queue(mailbox.0, &mut data, &mut size);
            (status == OK).then(|| owned(data, size))
        }
    }

    fn define_metric(self, kind: MetricKind, name: &str) -> Option<u32> {
        let mut id = 0;
        // SAFETY: the host reads the name and writes four bytes at a valid address.
        let status = unsafe { proxy_define_metric(kind as u32, name.as_ptr(), name.len(), &mut id) };
        if status != OK {
            log::error!("inflight: the host refused the stat {name} (status {status}); it will not be shown");
            return None;
        }
        Some(id)
    }

    fn record_metric(self, metric: u32, value: u64) {
        // SAFETY: the call passes no pointers. For an unknown number it returns an error status,
        // about which there is nothing to do.
        unsafe { proxy_record_metric(metric, value) };
    }

    fn increment_metric(self, metric: u32, by: i64) {
        // SAFETY: as in `record_metric`.
        unsafe { proxy_increment_metric(metric, by) };
    }

    fn memory_bytes(self) -> u64 {
        core::arch::wasm32::memory_size::<0>() as u64 * 65_536
    }
}

/// Envoy's shared data, as the store of the pod's figures.
impl Store for Envoy {
    fn get(&self, key: &str) -> Option<(Vec<u8>, u32)> {
        let (mut data, mut size, mut cas) = (null_mut(), 0, 0);
        // SAFETY: as in `header`.
        unsafe {
            let status = proxy_get_shared_data(key.as_ptr(), key.len(), &mut data, &mut size, &mut cas);
            (status == OK).then(|| (owned(data, size), cas))
        }
    }

    fn set(&self, key: &str, value: &[u8], expect: Expect) -> bool {
        // To the host, version 0 means "whatever is there". It counts versions up from 1 and
        // compares only if the key exists, so the largest number means "must not exist".
        let cas = match expect {
            Expect::Absent => u32::MAX,
            Expect::Version(version) => version.max(1),
        };
        // SAFETY: the host reads the key and the value.
        unsafe { proxy_set_shared_data(key.as_ptr(), key.len(), value.as_ptr(), value.len(), cas) == OK }
    }
}
