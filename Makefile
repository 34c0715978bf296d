# Everything from a fresh clone; `make help` lists it.
.DEFAULT_GOAL := all
CARGO ?= cargo
PYTHON ?= python3
# Panic messages contain the paths of source files. Without the remapping, each machine would build
# a different module.
CARGO_HOME ?= $(HOME)/.cargo
WASM_BUILD := RUSTFLAGS="$(RUSTFLAGS) --remap-path-prefix=$(CARGO_HOME)/registry/src=/crates" $(CARGO) build --locked \
	--target wasm32-wasip1 --release
WASM := $(WASM_BUILD) --package inflight-filter
DURATION ?=
CONCURRENCY ?= 2

.PHONY: all module static images dist toolchain help build-tests envoys unit budget reproducible e2e test soak run bench build-bench fuzz screenshot reference lint deny clean

all: module ## The module and the stats server, in release builds
	$(CARGO) build --locked --release --package inflight-statserver

# Adds what the Rust toolchain of a fresh machine lacks.
toolchain:
	@tools/toolchain.sh

# The same bytes wherever it is built (`make reproducible`).
module: toolchain ## The module alone
	$(WASM)
	$(PYTHON) tools/exports.py $(or $(CARGO_TARGET_DIR),target)/wasm32-wasip1/release/inflight_filter.wasm

# Static binaries: the C that is in them (ring) is compiled by Debian's compilers, and Rust's own linker
# and libc do the rest.
STATIC := x86_64-unknown-linux-musl aarch64-unknown-linux-musl
static: toolchain
	tools/toolchain.sh $(STATIC)
	tools/debian.sh aarch64-linux-gnu-gcc gcc-aarch64-linux-gnu libc6-dev-arm64-cross >/dev/null
	CC_x86_64_unknown_linux_musl=gcc CC_aarch64_unknown_linux_musl=aarch64-linux-gnu-gcc \
	CARGO_TARGET_X86_64_UNKNOWN_LINUX_MUSL_LINKER=rust-lld CARGO_TARGET_AARCH64_UNKNOWN_LINUX_MUSL_LINKER=rust-lld \
	INFLIGHT_REVISION=$(REVISION) \
	RUSTFLAGS="$(RUSTFLAGS) --remap-path-prefix=$(CARGO_HOME)/registry/src=/crates --remap-path-prefix=$(CURDIR)=/inflight" \
		$(CARGO) build --locked --release --package inflight-statserver $(STATIC:%=--target %)

VERSION ?= $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)
REVISION := $(shell git rev-parse HEAD 2>/dev/null || echo unknown)
images: module static ## The images of the server and of the module, as OCI archives in target/images
	rm -rf target/images && mkdir -p target/images/context/amd64 target/images/context/arm64
	cp LICENSE target/wasm32-wasip1/release/inflight_filter.wasm target/images/context
	cp target/x86_64-unknown-linux-musl/release/inflight-statserver target/images/context/amd64
	cp target/aarch64-unknown-linux-musl/release/inflight-statserver target/images/context/arm64
	tools/images.sh target/images $(VERSION)

dist: images ## All that a release has, in target/dist: make dist VERSION=x.y.z
	tools/dist.sh $(VERSION)

help: ## This list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# A stats server of a version that does not exist yet, for the test of a rolling upgrade.
NEXT := $(or $(CARGO_TARGET_DIR),target)/e2e/inflight-statserver-next
$(NEXT): Cargo.lock $(shell find src/stats src/statserver -type f)
	$(CARGO) build $(TESTED) --bin inflight-statserver --features inflight-statserver/next-format
	mv $(@D)/inflight-statserver $@

# The module with fault injection has a folder of its own, so that it is not mistaken for the
# shipped one.
build-tests: module $(NEXT) ## What the end-to-end tests run
	CARGO_TARGET_DIR=target/faulty $(WASM) --features fault-injection
	$(PYTHON) tools/exports.py target/faulty/wasm32-wasip1/release/inflight_filter.wasm
	$(CARGO) build $(TESTED) --bin inflight-statserver
	$(TESTS) --no-run

envoys: ## The Envoys that the tests run
	@$(PYTHON) tools/envoy.py oldest >/dev/null
	@$(PYTHON) tools/envoy.py newest >/dev/null

# All tests have the same profile and packages, so that their dependencies are built only once.
TESTED := --locked --profile e2e --package inflight-stats --package inflight-filter --package inflight-statserver \
	--package inflight-budget --package inflight-e2e
TESTS := $(CARGO) test $(TESTED)

unit: toolchain ## The tests without Envoy: rules, filter, stats server, layers
	$(TESTS) --lib --bins
	$(TESTS) --doc

budget: module ## What a request costs in instructions and host calls
	$(WASM_BUILD) --package inflight-empty
	$(TESTS) --test budget -- --nocapture

reproducible: module ## The module built once more, elsewhere: the same bytes
	tools/reproducible.sh

# These tests run alone, because they load the machine and compare with a log to half a percent. The
# others wait most of the time.
ALONE := breaker:: count::
IN_PAIRS := gateway::

e2e: build-tests envoys ## The tests against real Envoys, the oldest and the newest
	$(TESTS) --test e2e -- --nocapture --test-threads=1 $(ALONE)
	$(TESTS) --test e2e -- --nocapture --test-threads=2 $(IN_PAIRS)
	$(TESTS) --test e2e -- --nocapture --test-threads=3 $(patsubst %,--skip %,$(ALONE) $(IN_PAIRS))

test: unit budget reproducible e2e ## Every test

# Benchmarks and long runs use the stats server of the release profile. The other tests use that of
# the profile e2e, which builds minutes faster.
soak bench: export STATSERVER = $(CURDIR)/target/release/inflight-statserver

MINUTES ?= 30
soak: all build-tests envoys ## Everything at once, for half an hour: make soak [MINUTES=30]
	SOAK_MINUTES=$(MINUTES) $(TESTS) --test e2e -- --nocapture --ignored soak::

run: module ## The demos: make run [DURATION=seconds] [CONCURRENCY=workers], make run SCALE=1
	$(CARGO) build $(TESTED) --bin inflight-demo --bin inflight-statserver
	@$(PYTHON) tools/envoy.py any >/dev/null
	@exec target/e2e/inflight-demo --concurrency $(CONCURRENCY) $(if $(DURATION),--duration $(DURATION)) $(if $(SCALE),--scale)

# QUICK=1: fewer and shorter rounds, and docs/benchmarks.md stays as it is.
bench: build-bench envoys ## Envoy with and without the filter, the stats server and its store: make bench [QUICK=1]
	target/e2e/bench-envoy $(if $(QUICK),--rounds 2 --warm-up 1,--write)
	target/e2e/bench-hold $(if $(QUICK),--cycles 5)
	target/e2e/bench-statserver $(if $(QUICK),--rounds 1 --seconds 3)
	target/e2e/bench-store $(if $(QUICK),--rounds 1 --seconds 3 --pods 100000)

build-bench: all
	$(WASM_BUILD) --package inflight-empty
	$(CARGO) build --locked --profile e2e --package inflight-benches

SECONDS_EACH ?= 60
fuzz: toolchain ## Every format that comes from outside: make fuzz [SECONDS_EACH=60]
	tools/fuzz.sh $(SECONDS_EACH)

screenshot: module ## The README's pictures: two minutes of the demo, and the scaling demo
	$(CARGO) build $(TESTED) --bin inflight-demo --bin inflight-statserver
	@$(PYTHON) tools/envoy.py any >/dev/null
	target/e2e/inflight-demo --duration 120 --screenshot docs/page.png
	target/e2e/inflight-demo --scale --picture docs/scale-to-zero.svg

reference: ## Write the tables of docs/ that are made from the code: flags, keys, settings, metrics
	UPDATE_REFERENCE=1 $(TESTS) --bin inflight-statserver reference

lint: ## Format and clippy, for both targets
	@tools/toolchain.sh rustfmt clippy
	$(CARGO) fmt --all --check
	$(CARGO) clippy --profile e2e --locked --workspace --exclude inflight-empty --all-targets -- -D warnings
	$(CARGO) clippy --profile e2e --locked --package inflight-filter --package inflight-empty --target wasm32-wasip1 -- -D warnings
	$(CARGO) clippy --profile e2e --locked --package inflight-filter --target wasm32-wasip1 --features fault-injection -- -D warnings

deny: toolchain ## Licences, sources, bans; advisories where their data can be had
	tools/deny.sh

clean: ## What was built and downloaded
	$(CARGO) clean
	rm -rf .cache
