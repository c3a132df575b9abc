# make demo | test | faults | gpu | install | clean. Needs Python >= 3.11, make and a package index; nothing else.
SHELL  := /bin/bash
PYTHON ?= python3
BIN    := .venv/bin
STAMP  := .venv/installed

.PHONY: install demo test faults gpu clean

install: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; $$($(PYTHON) --version) was found. Set PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

demo: $(STAMP)
	$(BIN)/fader demo

test: $(STAMP)
	$(BIN)/python -m pytest

faults: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.campaign build/faults/$$(date +%Y%m%d-%H%M%S) --kills 200

gpu: $(STAMP)
	$(BIN)/python -m tests.gpu

clean:
	rm -rf .venv build *.egg-info .pytest_cache
