# What a person types. Each target installs or builds what it lacks, into the cache folder that setup/prelude.sh names.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := build
.PHONY: setup build demo check test bench bench-memory bench-gateway bench-serve bench-s3 bench-simulate soak clean help

# A test whose need is missing fails when the need stands here, instead of saying `skipped`.
NEEDS := root,criu,runc,garage,azurite,gcs,node,nginx,tmux,chromium,torch

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

setup: ## install or build CRIU, Garage, azurite, Chromium, Python and Debian packages
	@setup/all

build: ## build the `rewarm` program: target/release/rewarm
	cargo build --release --package rewarm-cli

demo: setup build ## snapshot a real model server, stop it, bring it back three times; STORE=file:///DIR for a folder
	@setup/demo $(STORE)

check: ## formatting, lints and documentation, with warnings as errors
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps

# Tests wait more than they compute: with one for each core two fifths of the processor time lay idle.
THREADS := $(shell echo $$(($$(nproc) * 3 / 2)))

# In the development profile, which optimises hash and codecs: building everything twice would take longer than it saves.
test: setup check ## what continuous integration does
	REWARM_TEST_NEEDS=$(NEEDS) RUST_TEST_THREADS=$${RUST_TEST_THREADS:-$(THREADS)} cargo test --workspace --no-fail-fast

bench: setup build ## the measured tables of the README: whole servers, then `rewarm bench`
	@setup/bench
	@target/release/rewarm bench

bench-memory: setup build ## fixed cost, eight replicas at once, shared memory, sparse servers, freezes: eight minutes
	@setup/bench-memory

bench-gateway: setup build ## the gateway beside nginx and HAProxy; needs wrk and haproxy
	@setup/bench-gateway

bench-serve: setup build ## pools from zero, waking, a burst, held requests, KEDA, and the simulator beside a replay
	@setup/bench-serve

bench-s3: setup build ## `rewarm bench` with a bucket, beside what the S3 server gives at most
	@setup/bench-s3

bench-simulate: build ## how fast `rewarm simulate` is, for a million requests
	@setup/bench-simulate

# `make test` runs each of these for some seconds, but Ray Serve.
soak: setup build ## long proofs: fuzzers, faults, repeated snapshots for hours, and Ray Serve
	@setup/ray
	REWARM_FUZZ_SECONDS=$${REWARM_FUZZ_SECONDS:-900} cargo test -p rewarm-integration-tests --test 'fuzz-*'
	REWARM_SOAK_ROUNDS=$${REWARM_SOAK_ROUNDS:-200} cargo test -p rewarm-integration-tests --test main devices::soak
	REWARM_SOAK_SCALINGS=$${REWARM_SOAK_SCALINGS:-1000} REWARM_SOAK_RESTARTS=$${REWARM_SOAK_RESTARTS:-1000} \
		REWARM_SOAK_AWAY_SECONDS=$${REWARM_SOAK_AWAY_SECONDS:-300} \
		cargo test -p rewarm-integration-tests --test main -- serve::scaling serve::luck::programs_killed serve::luck::a_store_that_is_away
	@setup/soak --minutes $${REWARM_SOAK_MINUTES:-120} --record integration-tests/soak/$$(date +%F).json

clean: ## remove what was built here; the cache folder stays
	cargo clean
