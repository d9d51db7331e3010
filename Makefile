# Every target sets up all that it needs in .venv.
PYTHON ?= python3
VENV := .venv
RUN := JAX_PLATFORMS=cpu $(VENV)/bin/python

.PHONY: demo test test-all test-oracle lint clean

demo: $(VENV)/installed
	$(RUN) train.py --config=configs/demo.py --workdir=runs/demo
	$(RUN) generate.py --workdir=runs/demo --max_new_tokens=96 --temperature=0.7 --top_p=0.95 --seed=1 \
	  --prompt "def main(" --prompt "class Queue:" --prompt "import "

test: $(VENV)/installed-test
	$(RUN) -m flake8
	$(RUN) -m pytest -m "not slow and not oracle"

test-all: $(VENV)/installed-oracle
	$(RUN) -m pytest

test-oracle: $(VENV)/installed-oracle
	$(RUN) -m pytest -m oracle

lint: $(VENV)/installed-test
	$(RUN) -m flake8

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
