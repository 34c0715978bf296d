#!/usr/bin/env bash
# The module must be the same, byte for byte, wherever it is built. Builds it once more, from a copy
# of the sources in another folder and with another cargo home, and compares.
set -euo pipefail
cd "$(dirname "$0")/.."
built=$PWD/target/wasm32-wasip1/release/inflight_filter.wasm
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
mkdir "$copy/sources" "$copy/cargo"
cp -r Cargo.toml Cargo.lock Makefile rust-toolchain.toml src tests benches tools "$copy/sources"
# The same downloads, under other paths.
home=${CARGO_HOME:-$HOME/.cargo}
for part in registry config.toml; do
    [ ! -e "$home/$part" ] || ln -s "$home/$part" "$copy/cargo/$part"
done
cd "$copy/sources"
CARGO_HOME="$copy/cargo" CARGO_TARGET_DIR="$copy/target" make --no-print-directory module >&2
sha256sum "$built" "$copy/target/wasm32-wasip1/release/inflight_filter.wasm" | sed "s#$copy#elsewhere#"
cmp "$built" "$copy/target/wasm32-wasip1/release/inflight_filter.wasm"
