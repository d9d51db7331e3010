# Every target sets up all that it needs in .venv.
PYTHON ?= python3
VENV := .venv
RUN := JAX_PLATFORMS=cpu $(VENV)/bin/python
# A test compiles on one core, and takes a few GiB at most.
PYTEST := $(RUN) -m pytest --numprocesses=auto --maxprocesses=8 --dist=worksteal
LINT := $(VENV)/bin/ruff format --check . && $(VENV)/bin/ruff check .

.PHONY: demo test test-all test-oracle test-slow test-gpu-aot lint format clean

demo: $(VENV)/installed
	$(RUN) train.py --config=configs/demo.py --workdir=runs/demo
	$(RUN) generate.py --workdir=runs/demo --max_new_tokens=96 --temperature=0.7 --top_p=0.95 --seed=1 \
	  --prompt "def main(" --prompt "class Queue:" --prompt "import "

test: $(VENV)/installed-test
	$(LINT)
	$(PYTEST) -m "not slow and not oracle"

test-all: $(VENV)/installed-oracle
	$(PYTEST)

test-oracle: $(VENV)/installed-oracle
	$(PYTEST) -m oracle

test-slow: $(VENV)/installed-test
	$(PYTEST) -m "slow and not oracle"

# Programs for H100s, compiled without one: the two plugin wheels, not the libraries that they would run with.
test-gpu-aot: $(VENV)/installed-test
	version=$$($(RUN) -c "import jaxlib; print(jaxlib.__version__)") && $(VENV)/bin/python -m pip install -q --no-deps \
	  jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version
	$(PYTEST) tests/kernels/test_flash_gpu.py tests/kernels/test_blocks.py tests/kernels/test_cudnn.py tests/benchmarks/test_gpu_programs.py \
	  -m "not oracle"

lint: $(VENV)/installed-test
	$(LINT)

# Lays out every file, and mends what can be mended without thought.
format: $(VENV)/installed-test
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) runs

$(VENV)/installed: setup.cfg
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(VENV)/bin/python -m pip install -q -e .[test,plan]
	touch $@

$(VENV)/installed-oracle: $(VENV)/installed-test
	$(VENV)/bin/python -m pip install -q -e .[oracle]
	touch $@
