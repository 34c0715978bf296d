#!/usr/bin/env bash
# Runs cargo-deny, which is installed into .cache if it is missing. The advisory database is a git
# repository that not every machine can reach: then that one check is left out, with a message.
set -euo pipefail
cd "$(dirname "$0")/.."
version=0.20.2
if ! cargo deny --version 2>/dev/null | grep -q " $version$"; then
    # It runs for a second, which is not worth the minutes of an optimised build.
    [ -x .cache/deny/bin/cargo-deny ] ||
        CARGO_PROFILE_RELEASE_OPT_LEVEL=0 CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=64 \
        cargo install --quiet --locked --root .cache/deny --version "$version" cargo-deny
    PATH="$PWD/.cache/deny/bin:$PATH"
fi
cargo deny --locked check bans licenses sources
if timeout 60 cargo deny fetch db >/dev/null 2>&1; then
    cargo deny --locked check advisories
else
    echo "advisories: NOT checked, the advisory database cannot be reached from here"
fi
