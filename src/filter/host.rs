//! The host calls that run for every request and every tick. The SDK's wrappers panic on any status
//! they did not expect (and on a header that is not UTF-8); here every failure is a value.

use std::ptr::null_mut;

use inflight_stats::pod::{Expect, Store};

const OK: u32 = 0;

/// Header maps, by proxy-wasm's numbers.
#[derive(Clone, Copy)]
#[repr(u32)]
pub enum Headers {
    Request = 0,
    Response = 2,
    CallResponse = 6,
}

/// Metric types, by proxy-wasm's numbers.
#[derive(Clone, Copy)]
#[repr(u32)]
pub enum Kind {
    Counter = 0,
    Gauge = 1,
    Histogram = 2,
}

const CALL_RESPONSE_BODY: u32 = 4;

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
        most: usize,
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

/// Nanoseconds of the process's monotonic clock, the same for all its threads. proxy-wasm itself has only
/// the wall clock; a host without WASI's clock gets that, and then its steps are cut by the pod's clock.
pub fn monotonic_ns() -> u64 {
    const MONOTONIC: u32 = 1;
    let mut time = 0;
    // SAFETY: the host writes eight bytes at a valid, aligned address.
    match unsafe { clock_time_get(MONOTONIC, 1, &mut time) } {
        OK => time,
        _ => wall_ns(),
    }
}

/// Nanoseconds since 1970 by the wall clock; 0 if the host has none.
pub fn wall_ns() -> u64 {
    let mut time = 0;
    // SAFETY: the host writes eight bytes at a valid, aligned address.
    unsafe { proxy_get_current_time_nanoseconds(&mut time) };
    time
}

/// The next tick of this root context in so many milliseconds (at least one: 0 would mean never), then at
/// that distance. Called from a tick, it re-arms the timer.
pub fn tick_in(milliseconds: u64) {
    let period = u32::try_from(milliseconds).unwrap_or(u32::MAX).max(1);
    // SAFETY: no memory changes hands.
    if unsafe { proxy_set_tick_period_milliseconds(period) } != OK {
        log::error!("inflight: the host refused a tick period of {period} ms");
    }
}

/// The root context at hand, which asked for more time at its end, needs no more of it.
pub fn done() {
    // SAFETY: no memory changes hands. A context that is not about to end is NotFound, which is as good.
    unsafe { proxy_done() };
}

/// Bytes that the host allocated in this module's memory and gave away.
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

/// The value of a header, if it is there. `name` in lower case.
pub fn header(map: Headers, name: &str) -> Option<Vec<u8>> {
    let (mut data, mut size) = (null_mut(), 0);
    // SAFETY: the host reads the name and writes an allocation of its own making through valid pointers.
    unsafe {
        let status = proxy_get_header_map_value(map as u32, name.as_ptr(), name.len(), &mut data, &mut size);
        (status == OK).then(|| owned(data, size))
    }
}

/// Sets a header to one value, whatever it was.
pub fn set_header(map: Headers, name: &str, value: &[u8]) {
    // SAFETY: the host reads name and value.
    unsafe {
        proxy_replace_header_map_value(map as u32, name.as_ptr(), name.len(), value.as_ptr(), value.len());
    }
}

/// Takes a header away, if it is there.
pub fn remove_header(map: Headers, name: &str) {
    // SAFETY: the host reads the name.
    unsafe {
        proxy_remove_header_map_value(map as u32, name.as_ptr(), name.len());
    }
}

/// The beginning of the body of the answer to an HTTP call.
pub fn call_response_body(most: usize) -> Vec<u8> {
    let (mut data, mut size) = (null_mut(), 0);
    // SAFETY: as in `header`.
    unsafe {
        match proxy_get_buffer_bytes(CALL_RESPONSE_BODY, 0, most, &mut data, &mut size) {
            OK => owned(data, size),
            _ => Vec::new(),
        }
    }
}

/// A property; `path` with a zero byte between its parts.
pub fn property(path: &str) -> Option<Vec<u8>> {
    let (mut data, mut size) = (null_mut(), 0);
    // SAFETY: as in `header`.
    unsafe {
        let status = proxy_get_property(path.as_ptr(), path.len(), &mut data, &mut size);
        (status == OK && !data.is_null()).then(|| owned(data, size))
    }
}

/// The code that the client was sent; 0 if the stream ended before any response. At a stream's end the response's
/// headers are those that were sent, local replies included; a header costs a tenth of the property `response.code`.
pub fn response_code() -> u16 {
    let status = header(Headers::Response, ":status");
    status.and_then(|text| std::str::from_utf8(&text).ok()?.parse().ok()).unwrap_or(0)
}

/// The message queue of a name, made or taken over: the host calls this VM's root context when there is
/// something in it.
pub fn mailbox(name: &str) -> Option<u32> {
    let mut id = 0;
    // SAFETY: the host reads the name and writes four bytes at a valid address.
    let status = unsafe { proxy_register_shared_queue(name.as_ptr(), name.len(), &mut id) };
    (status == OK).then_some(id)
}

/// Puts a message into another worker's queue; whether that worked.
pub fn post(mailbox: u32, message: &[u8]) -> bool {
    // SAFETY: the host reads the message.
    unsafe { proxy_enqueue_shared_queue(mailbox, message.as_ptr(), message.len()) == OK }
}

/// The next message, if there is one.
pub fn next_message(mailbox: u32) -> Option<Vec<u8>> {
    let (mut data, mut size) = (null_mut(), 0);
    // SAFETY: as in `header`.
    unsafe { (proxy_dequeue_shared_queue(mailbox, &mut data, &mut size) == OK).then(|| owned(data, size)) }
}

/// Does something in the context of each of several streams, then goes back to `home`. A stream that is gone is
/// left out: what is done would happen to whichever context is in effect.
fn for_each_stream(streams: &[u32], home: u32, mut action: impl FnMut()) {
    for &stream in streams {
        // SAFETY: no memory changes hands.
        if unsafe { proxy_set_effective_context(stream) } == OK {
            action();
        }
    }
    if !streams.is_empty() {
        // SAFETY: as above.
        unsafe { proxy_set_effective_context(home) };
    }
}

/// Does something in another context than the present one, `home`.
pub fn in_context(context: u32, home: u32, action: impl FnMut()) {
    for_each_stream(&[context], home, action);
}

/// Lets paused requests go on. Called in the context `home`.
pub fn resume(streams: &[u32], home: u32) {
    const REQUEST: u32 = 0;
    // SAFETY: no memory changes hands. The host goes on with the stream after this callback has returned.
    for_each_stream(streams, home, || unsafe {
        proxy_continue_stream(REQUEST);
    });
}

/// Answers the request at hand.
pub fn respond(status: u32, body: &[u8], headers: &[(&str, &str)]) {
    const DETAILS: &str = "inflight";
    const NO_GRPC_STATUS: i32 = -1;
    let headers = serialized(headers);
    // SAFETY: the host reads the four buffers.
    unsafe {
        proxy_send_local_response(
            status,
            DETAILS.as_ptr(),
            DETAILS.len(),
            body.as_ptr(),
            body.len(),
            headers.as_ptr(),
            headers.len(),
            NO_GRPC_STATUS,
        );
    }
}

/// Answers several paused requests. Called in the context `home`.
pub fn respond_to(streams: &[u32], home: u32, status: u32, body: &[u8], headers: &[(&str, &str)]) {
    for_each_stream(streams, home, || respond(status, body, headers));
}

/// A header map as proxy-wasm writes it: the count, all lengths, then names and values, each with a zero.
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

/// Whether Envoy or the client ended the stream while the app may still have been at work on it, by
/// Envoy's response flags.
pub fn was_broken_off() -> bool {
    // Timeouts of the upstream (UT), of the stream (SI) and later additions, a local reset (LR), a client that
    // went away (DC). The others mean that the app ended it, or never had it.
    const UT: u64 = 0x4;
    const LR: u64 = 0x8;
    const DC: u64 = 0x4000;
    const FROM_SI_ON: u64 = !0xffff;
    let value = property("response\0flags").and_then(|bytes| <[u8; 8]>::try_from(bytes).ok());
    value.is_some_and(|bytes| u64::from_le_bytes(bytes) & (UT | LR | DC | FROM_SI_ON) != 0)
}

/// A metric's id, if the host defines it.
pub fn define_metric(kind: Kind, name: &str) -> Option<u32> {
    let mut id = 0;
    // SAFETY: the host reads the name and writes four bytes at a valid address.
    let status = unsafe { proxy_define_metric(kind as u32, name.as_ptr(), name.len(), &mut id) };
    if status != OK {
        log::error!("inflight: the host refused the stat {name} (status {status})");
        return None;
    }
    Some(id)
}

/// Sets a gauge, or adds a value to a histogram.
pub fn record(metric: Option<u32>, value: u64) {
    if let Some(id) = metric {
        // SAFETY: no memory changes hands. An unknown id is answered by a status, and there is nothing to do.
        unsafe { proxy_record_metric(id, value) };
    }
}

/// Adds to a counter.
pub fn increment(metric: Option<u32>, by: u64) {
    if let (Some(id), 1..) = (metric, by) {
        // SAFETY: as in `record`.
        unsafe { proxy_increment_metric(id, i64::try_from(by).unwrap_or(i64::MAX)) };
    }
}

/// Changes this VM's part of a gauge that all VMs add to.
pub fn adjust(metric: Option<u32>, to: u64, from: u64) {
    if let Some(id) = metric
        && to != from
    {
        let difference = i64::try_from(to).unwrap_or(i64::MAX).saturating_sub_unsigned(from);
        // SAFETY: as in `record`.
        unsafe { proxy_increment_metric(id, difference) };
    }
}

/// The size of this VM's linear memory in bytes; it never shrinks.
pub fn memory_bytes() -> u64 {
    #[cfg(target_arch = "wasm32")]
    return core::arch::wasm32::memory_size::<0>() as u64 * 65_536;
    #[cfg(not(target_arch = "wasm32"))]
    return 0;
}

/// Envoy's shared data, as the store of the pod's figures.
pub struct SharedData;

impl Store for SharedData {
    fn get(&self, key: &str) -> Option<(Vec<u8>, u32)> {
        let (mut data, mut size, mut cas) = (null_mut(), 0, 0);
        // SAFETY: as in `header`.
        unsafe {
            let status = proxy_get_shared_data(key.as_ptr(), key.len(), &mut data, &mut size, &mut cas);
            (status == OK).then(|| (owned(data, size), cas))
        }
    }

    fn set(&self, key: &str, value: &[u8], expect: Expect) -> bool {
        // To the host 0 means "whatever is there". It counts versions up from 1 and compares only if
        // the key exists, so the largest number stands for "must not exist".
        let cas = match expect {
            Expect::Absent => u32::MAX,
            Expect::Version(version) => version.max(1),
        };
        // SAFETY: the host reads key and value.
        unsafe { proxy_set_shared_data(key.as_ptr(), key.len(), value.as_ptr(), value.len(), cas) == OK }
    }
}
