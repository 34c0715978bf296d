"""Removes a proxy-wasm module's exports without work for the filter: exports.py MODULE.

The SDK exports every callback, and Envoy enters the VM for each exported one: eight times for a
plain request, of which only five have work. Entering the VM is most of a filter's cost.
"""

import fcntl
import pathlib
import sys

KEPT = {
    "memory",
    "_initialize",
    "proxy_abi_version_0_2_1",
    "proxy_on_memory_allocate",
    "proxy_on_vm_start",
    "proxy_on_configure",
    "proxy_on_tick",
    "proxy_on_queue_ready",
    "proxy_on_http_call_response",
    "proxy_on_context_create",
    "proxy_on_request_headers",
    "proxy_on_done",
    "proxy_on_log",
    "proxy_on_delete",
}
HEADER, EXPORTS = 8, 7


def number(data, at):
    """Returns an unsigned LEB128 number, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def encoded(value):
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def kept(body):
    """Returns the export section with the kept exports only, and their names."""
    count, at = number(body, 0)
    entries, names = [], []
    for _ in range(count):
        begin = at
        length, at = number(body, at)
        name = body[at : at + length].decode()
        _, at = number(body, at + length + 1)
        if name in KEPT:
            entries.append(body[begin:at])
            names.append(name)
    return encoded(len(entries)) + b"".join(entries), names


path = pathlib.Path(sys.argv[1])
# The lock is for two runs of make at once. The file is written in place, because cargo would undo a
# rename.
lock = path.open("rb")
fcntl.flock(lock, fcntl.LOCK_EX)
module = lock.read()
assert module[:HEADER] == b"\0asm\1\0\0\0", f"{path} is no wasm module"
out, at, found = bytearray(module[:HEADER]), HEADER, []
while at < len(module):
    section = module[at]
    size, begin = number(module, at + 1)
    body = module[begin : begin + size]
    at = begin + size
    if section == EXPORTS:
        body, found = kept(body)
    out += bytes([section]) + encoded(len(body)) + body
missing = KEPT - set(found)
assert not missing, f"{path} does not export {', '.join(sorted(missing))}"
if bytes(out) != module:
    path.write_bytes(out)
