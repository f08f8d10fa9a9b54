# `make demo` and `make test` do all their set-up; everything they install goes to .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder
# Most of what is slow is in one file, a test for each model type: whoever has nothing left takes half of the other's.
SHARING := -n 2 --dist worksteal
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# What is imported is compiled when it first is, and that is kept: a third of what is installed. pip would compile all of it.
unexport PYTHONDONTWRITEBYTECODE

GPU_PYTHON ?= python3
OLDEST_PYTHON ?= python3

.PHONY: demo test test-all test-wheel test-oldest gpu lint format bench clean

demo: $(INSTALLED)  ## fine-tune SmolLM2-135M and take the adapter home to PEFT; DEMO="--resume" adds flags
	$(BIN)/python examples/finetune.py $(DEMO)

test: $(INSTALLED)  ## the default suite: no GPU, no network, no model downloads
	$(BIN)/python -m pytest -q $(WORKERS)

test-all: $(INSTALLED) $(if $(PART),,test-wheel)  ## also what takes minutes and the demo's model, hours in all; PART=3/8 runs an eighth of it
	$(BIN)/python -m pytest -q $(SHARING) -m "slow or not slow" $(addprefix --part=,$(PART))

test-wheel: $(INSTALLED)  ## build the wheel and test what it installs, away from the sources
	rm -rf build/wheel && mkdir -p build/wheel
	$(PIP) wheel --no-deps --wheel-dir build/wheel .
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip --quiet --disable-pip-version-check install -c constraints.txt \
		"$$(ls build/wheel/*.whl)[demo,test]"
	cp -r tests examples pyproject.toml build/wheel
	cd build/wheel && venv/bin/python -m pytest -q -p no:cacheprovider --ignore tests/test_packaging.py \
		--ignore tests/test_docs.py --ignore tests/test_new_process.py

test-oldest:  ## the default suite with the oldest releases that are supported; OLDEST_PYTHON=python3.12
	$(OLDEST_PYTHON) -m venv build/oldest
	build/oldest/bin/python -m pip --quiet --disable-pip-version-check install -c constraints-oldest.txt \
		--editable ".[demo,test]"
	build/oldest/bin/python -m pytest -q $(WORKERS) -p no:cacheprovider

gpu:  ## what only a GPU shows, with the machine's own torch, bitsandbytes and PEFT: tests, then figures; build/gpu has both
	mkdir -p build/gpu
	PYTHONPATH=$(CURDIR) QLORA_FX_GPU_LOG=build/gpu/tests.jsonl $(GPU_PYTHON) -m pytest -q tests/cuda -n 8 \
		-p no:cacheprovider -p no:benchmark -W default -W "error:Inductor cannot compile"
	PYTHONPATH=$(CURDIR) $(GPU_PYTHON) benchmarks/gpu.py --json build/gpu/figures.json

lint: $(INSTALLED)  ## formatting, lints and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(INSTALLED)  ## step, cold start, profile, memory and loading, beside PEFT + bitsandbytes; nothing else may run meanwhile
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/cold_start.py
	$(BIN)/python benchmarks/profile.py --out build/profile.png
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python benchmarks/loading.py
	$(BIN)/python benchmarks/loading.py --merge
	$(BIN)/python benchmarks/loading.py --trace
	$(BIN)/python benchmarks/generate.py

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --no-compile --constraint constraints.txt --editable ".[demo,test,dev]"
	touch $@

clean:
	rm -rf $(VENV) build out *.egg-info .mypy_cache .ruff_cache .pytest_cache
