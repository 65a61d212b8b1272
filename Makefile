# What there is to do: build, test, lint, demo, bench, clean.
#
# Variables:
#   CARGO            the cargo to use
#   SUITES           run only the suites whose name contains this (make suites SUITES=failure)
#   BENCH            arguments for daisy-bench (make bench BENCH=--quick; BENCH="--only small --contestants kernel")
#   DAISY_TEST_LOG   the log filter of all daemons in suites and demo (RUST_LOG's syntax; info)
#   DAISY_TEST_PCAP  if set, suites capture what passes the router; kept with the logs if they fail
#   DAISY_BIN_DIR    where suites and demo look for the daemons, if not where cargo puts them

CARGO ?= cargo
SUITES ?=
BENCH ?=
export CARGO

.PHONY: all build setup setup-bench root test suites lint demo bench clean

all: build

# Installs packages that are missing.
setup:
	@./tests/setup.sh

# And those that only comparisons need.
setup-bench:
	@./tests/setup.sh bench

build: setup
	$(CARGO) build --workspace --bins

root:
	$(if $(filter 0,$(shell id -u)),,$(error needs root, for network namespaces and eBPF programs (try: sudo make ...)))
	@true

# Everything: unit tests, properties, model, eBPF against Rust, and the end-to-end suites; then whether each promise
# of SPECIFICATION.md has its test.
test: root build
	$(CARGO) test --workspace
	@./tests/specification.py

# The end-to-end suites alone, with what they print.
suites: root build
	$(CARGO) test -p daisy-tests --test suites -- --nocapture $(SUITES)

lint: setup
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	python3 shared/vectors/flow_hash.py --check

demo: root setup
	$(CARGO) build --release --workspace --bins
	target/release/daisy-demo

# daisy by itself and beside others, about a quarter of an hour on two quiet cores: raw figures, plots, summary.json and a
# README in eval/runs/<date>-<machine>/.
bench: root setup-bench
	$(CARGO) build --release --workspace --bins --examples
	target/release/daisy-bench $(BENCH)

clean:
	$(CARGO) clean
