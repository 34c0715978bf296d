#!/usr/bin/env bash
# Adds to the Rust toolchain what it lacks: the module's target, and what is named, components and other
# targets (toolchain.sh [rustfmt] [clippy] [TARGET...]). rustup adds by itself what rust-toolchain.toml lists, unless
# RUSTUP_AUTO_INSTALL is 0.
set -euo pipefail
cd "$(dirname "$0")/.."
target=wasm32-wasip1

fail() {
    echo "$*" >&2
    exit 1
}

# Prints what is missing: nothing, "toolchain", or a line for each target and component.
missing() {
    local folder name
    rustc --version >/dev/null 2>&1 || { echo toolchain && return; }
    for name in "$target" "$@"; do
        case $name in
        rustfmt) cargo fmt --version >/dev/null 2>&1 || echo "component $name" ;;
        clippy) cargo clippy --version >/dev/null 2>&1 || echo "component $name" ;;
        *)
            folder=$(rustc --print target-libdir --target "$name" 2>/dev/null) ||
                fail "toolchain.sh: $name is neither rustfmt nor clippy nor a target of rustc"
            [ -d "$folder" ] || echo "target $name"
            ;;
        esac
    done
}

command -v rustc >/dev/null || fail "rustc is not on the PATH: install Rust with rustup (https://rustup.rs), then open a new shell"
[ -n "$(missing "$@")" ] || exit 0
command -v rustup >/dev/null || fail "Rust in $(rustc --print sysroot) lacks its $(missing "$@" | paste -sd,), and there is no" \
    "rustup to add it: install Rust with rustup (https://rustup.rs)"
# One process at a time, over all clones: rustup itself has no lock.
home=${RUSTUP_HOME:-$HOME/.rustup}
mkdir -p "$home"
exec 9<"$home"
flock 9
missing "$@" | while read -r kind name; do
    case $kind in
    toolchain) command=(rustup toolchain install) ;;
    *) command=(rustup "$kind" add "$name") ;;
    esac
    echo "${command[*]}" >&2
    said=$(RUST_BACKTRACE=0 "${command[@]}" 2>&1 9>&-) || fail "the Rust $kind${name:+ $name} cannot be had" \
        "($(grep -m1 '^error:' <<<"$said" || tail -n1 <<<"$said")): run \`${command[*]}\` where the network can be reached"
done
# A toolchain that was just installed may still lack parts.
[ -z "$(missing "$@")" ] || fail "Rust still lacks its $(missing "$@" | paste -sd,): see \`rustup show\`"
