# Two targets are all a newcomer needs: `make demo` and `make test`. Each makes its own environment when it is missing.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
# XLA frees its buffers after every step and takes them anew, page by page; in pages of 2 MiB a small model's step takes
# a CPU a fifth to a quarter less. Only glibc knows the name.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: help demo teach test lint test-slow test-faults test-latest plan-all format clean

help:
	@echo "make demo         train the miniature and write runs/demo/report.html "
	@echo "make teach        teach the demo's MLLM from nothing, examine it, write runs/miniature/taught"
	@echo "make test         the gate: lint, types, all tests but the slow ones"
	@echo "make test-slow    the tests that take longer"
	@echo "make test-faults  kills, losses and bad input, on real processes"
	@echo "make test-latest  the torch-free tests on the newest Python found (PYTHON_LATEST=... names one)"
	@echo "make plan-all     compile every full-size config for its TPU slices and write docs/performance.md"
	@echo "make format       format and fix what can be fixed"

$(VENV)/demo: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[miniature]'
	touch $@

# torch first and alone: a plain requirement would take the build with CUDA.
$(VENV)/test: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet '$(TORCH)'
	$(BIN)/pip install --quiet --editable '.[miniature,media,torch,tpu,wandb,dev]'
	touch $@

demo: $(VENV)/demo
	$(BIN)/metacanvas demo

teach: $(VENV)/demo
	$(BIN)/metacanvas teach --out runs/miniature/taught

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: lint
	$(BIN)/python -m pytest -m 'not slow' -n 2 --dist worksteal -q

test-slow: $(VENV)/test
	$(BIN)/python -m pytest -m slow -q

test-faults: $(VENV)/test
	$(BIN)/python -m pytest -m faults -q

test-latest:
	./tests/latest.sh

plan-all: $(VENV)/test
	$(BIN)/python benchmarks/plan_all.py

format: $(VENV)/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-latest build *.egg-info
