# make demo | test | lint | audit | lock. Each does its whole set-up in .venv; needs Python >= 3.11 (< 3.15), make
# and a C++ compiler.
PYTHON ?= python3
VENV   ?= .venv
# On a GPU machine: make EXTRAS=gpu,eval,ray,demo,dev,docker
EXTRAS ?= cpu,eval,ray,demo,dev,docker
# Where the CPU build of torch is found if pip's own indexes lack it.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

# Not empty: exactly the versions of requirements/, whose digests are checked (CPU).
LOCKED ?=
# How uv finds the CPU build of torch for `make lock`.
LOCK_FLAGS ?= --torch-backend cpu

BIN   := $(VENV)/bin
STAMP := $(VENV)/.svdserve-installed
PIP   := $(BIN)/python -m pip --disable-pip-version-check

export HF_HUB_OFFLINE ?= 1
export VLLM_NO_USAGE_STATS ?= 1
export DO_NOT_TRACK ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: demo test lint docker-check install audit lock clean
demo: $(STAMP)
	$(BIN)/python examples/demo.py

# One process a core, each with one thread; a file's tests share their servers, so stay together.
# PYTEST_FLAGS=--exhaustive adds the tests that only continuous integration runs every time.
PYTEST_FLAGS ?=
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadscope --durations=25 $(PYTEST_FLAGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# Builds the CPU image and serves from it, as root with Debian's buildah, crun and debootstrap.
MODEL ?= work/demo/SmolLM2-135M-Instruct
docker-check:
	docker/check.sh $(MODEL)

install: $(STAMP)

# Asks PyPI for advisories; where it cannot be reached, a clone of github.com/pypa/advisory-database
# tells: make audit ADVISORIES=DIR. --strict: what could not be asked about is a failure, not a pass.
AUDIT = $(BIN)/pip-audit --strict --disable-pip
audit: $(STAMP)
ifdef ADVISORIES
	$(BIN)/python requirements/audit.py $(ADVISORIES)
else
	$(PIP) install --quiet 'pip-audit>=2.9'
	$(AUDIT) --require-hashes -r requirements/cpu.txt
	sed 's/+cpu//' requirements/torch.txt | $(AUDIT) --no-deps -r /dev/stdin
endif

# For Linux on x86-64, by the oldest Python that is supported.
# serve.txt is the part of cpu.txt that an image needs.
COMPILE = $(BIN)/uv pip compile pyproject.toml --extra cpu --python-platform x86_64-manylinux_2_28 \
  --python-version 3.11 --no-annotate --no-header --quiet $(LOCK_FLAGS)
OTHERS = --extra eval --extra ray --extra demo --extra dev --extra docker
DIGESTS = --generate-hashes --no-emit-package torch
lock: $(STAMP)
	$(PIP) install --quiet 'uv>=0.9'
	$(COMPILE) $(OTHERS) --output-file requirements/torch.txt
	sed -i -n '/^torch==/p' requirements/torch.txt
	$(COMPILE) $(OTHERS) $(DIGESTS) --output-file requirements/cpu.txt
	$(COMPILE) $(DIGESTS) --constraint requirements/cpu.txt --output-file requirements/serve.txt

# torch has no digest in the lock: each platform gets another build of it, from PyTorch's own index.
define INSTALL
$(PIP) install --quiet -e '.[$(EXTRAS)]' || \
  $(PIP) install --quiet --extra-index-url $(TORCH_INDEX) -e '.[$(EXTRAS)]'
endef
define INSTALL_LOCKED
{ $(PIP) install --quiet --no-deps -r requirements/torch.txt || \
  $(PIP) install --quiet --no-deps --extra-index-url $(TORCH_INDEX) -r requirements/torch.txt; } && \
$(PIP) install --quiet --no-deps --require-hashes -r requirements/cpu.txt && \
$(PIP) install --quiet --no-deps --no-build-isolation -e .
endef

# An old pip backtracks for minutes over vLLM's requirements, so it is upgraded first. The second
# index is asked only after a failure: where it cannot be reached pip would wait for it.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || \
	  { echo "$(PYTHON) is no Python 3.11 to 3.14; name one: make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	$(if $(LOCKED),$(INSTALL_LOCKED),$(INSTALL))
	$(BIN)/python -m svdserve.server.cpu_install
	$(BIN)/python -c 'from svdserve.kernels.cpu import unsupported; print("fused kernel:", unsupported() or "ready")'
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
