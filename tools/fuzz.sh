#!/usr/bin/env bash
# Runs each fuzz target for some seconds: fuzz.sh SECONDS [TARGET...]. A finding is left in
# fuzz/artifacts.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=$1
shift
version=0.13.2
# libFuzzer is C++.
tools/debian.sh c++ g++ >/dev/null
if ! cargo fuzz --version >/dev/null 2>&1; then
    [ -x .cache/fuzz/bin/cargo-fuzz ] ||
        CARGO_PROFILE_RELEASE_OPT_LEVEL=0 cargo install --quiet --locked --root .cache/fuzz --version "$version" cargo-fuzz
    PATH="$PWD/.cache/fuzz/bin:$PATH"
fi
targets=("$@")
[ ${#targets[@]} -gt 0 ] || mapfile -t targets < <(cd fuzz/fuzz_targets && basename -s .rs ./*.rs)
# Without sanitizers the stable compiler is enough; overflow checks and assertions are on.
for target in "${targets[@]}"; do
    # Earlier findings are tests by now.
    rm -rf "fuzz/artifacts/$target"
    mkdir -p "fuzz/corpus/$target"
    cp -n fuzz/seeds/"$target"/* "fuzz/corpus/$target/" 2>/dev/null || true
    echo "== $target, $seconds s"
    cargo fuzz run --sanitizer none "$target" -- -max_total_time="$seconds" -max_len=8192 -timeout=10 -rss_limit_mb=1024 \
        -print_final_stats=1 2>&1 | grep -E "SUMMARY|panicked|DONE|number_of_executed_units|ERROR" || true
    [ -z "$(ls "fuzz/artifacts/$target" 2>/dev/null)" ] || { echo "found: fuzz/artifacts/$target"; exit 1; }
done
