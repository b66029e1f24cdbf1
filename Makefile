# hostd. `make demo` and `make test` need nothing but a Debian machine and root (or sudo): each sets up
# what it uses and says what it is doing. Everything can be run again.

PYTHON ?= /usr/bin/python3
VENV   := .venv
BIN    := $(VENV)/bin
BUILD  := build
APT    := python3-venv python3-dev gcc pkg-config libtss2-dev libvirt-dev libseccomp2 swtpm swtpm-tools tpm2-tools \
          qemu-system-x86 qemu-utils ovmf mmdebstrap e2fsprogs openssl openssh-client git
SUDO   := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

.PHONY: help demo test rehearsal storm check bench lab clean packages venv

help:
	@echo "make demo   the main job, shown step by step in the lab (a KVM host in a virtual machine)"
	@echo "make test   all tests: lint, types, unit, real QEMU on this machine, the lab"
	@echo "make rehearsal  the lab's long part: every attack on a running host, and a storm of legitimate events"
	@echo "make storm  the gate's long part: its promise over 2,000,000 requests, 200 attacks of each kind under load"
	@echo "make venv   the virtual environment in .venv, with hostd, hostctl and hostd-guest"
	@echo "make check  the quick inner loop: lint, types, unit tests"
	@echo "make bench  benchmarks as JSON lines, written to build/bench.json too"
	@echo "make lab    a shell in the lab's host, with a guest running"
	@echo "make clean  remove build results and the virtual environment (the lab's image stays cached)"

# The gate is held against them; nothing else needs them.
PEER   := softhsm2 p11-kit p11-kit-modules
$(BUILD)/.packages: WANTED := $(APT)
$(BUILD)/.peer: WANTED := $(PEER)

$(BUILD)/.packages $(BUILD)/.peer: Makefile
	@mkdir -p $(BUILD)
	@missing=""; for p in $(WANTED); do dpkg-query -W -f='$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || missing="$$missing $$p"; done; \
	if [ -n "$$missing" ]; then echo "== system packages:$$missing"; $(SUDO) apt-get update -q && \
	  $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $$missing; \
	else echo "== system packages: all there"; fi
	@touch $@

$(BUILD)/.venv: pyproject.toml qemu/lean_pytss.py $(BUILD)/.packages
	@echo "== virtual environment in $(VENV) (compiles two libraries the first time, about a minute)"
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --upgrade pip
	@$(BIN)/python -P qemu/lean_pytss.py --install
	@$(BIN)/python -m pip install -q -e '.[host,dev]'
	@touch $@

packages: $(BUILD)/.packages
venv: $(BUILD)/.venv

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -m "not lab and not qemu and not slow"

test: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@echo "== all tests; those marked lab boot a KVM host in software emulation and take some minutes"
	$(SUDO) $(BIN)/python -m pytest -m "not rehearsal" --durations=15 --cov --cov-report=term:skip-covered

rehearsal: venv
	$(SUDO) $(BIN)/python -m pytest -m rehearsal -v -rA

storm: venv
	$(SUDO) $(BIN)/python -m tests.bench.traces
	$(SUDO) env HOSTD_STORM=200 $(BIN)/python -m pytest -s tests/e2e/test_e2e_storm.py

demo: venv
	$(SUDO) $(BIN)/python -m qemu.demo

bench: venv $(BUILD)/.peer
	@$(SUDO) $(BIN)/python -m tests.bench

lab: venv
	$(SUDO) $(BIN)/python -m qemu shell

clean:
	rm -rf $(BUILD) $(VENV) dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
