# make demo | test | faults | gpu | install | clean. Needs Python >= 3.11, make and a package index; nothing else.
SHELL  := /bin/bash
PYTHON ?= python3
BIN    := .venv/bin
STAMP  := .venv/installed

.PHONY: install demo test faults gpu clean

install: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "Python 3.11 or newer is needed; $$($(PYTHON) --version) was found. Set PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

demo: $(STAMP)
	$(BIN)/fader demo

# The tests of the Slurm jobs mostly wait, so they run beside the others; what they print comes at the end, and what failed last.
# Tests on several ranks need both cores, so they come last, when those of Slurm should be done. One thread each, because
# the tests' small tensors take longer with more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test: $(STAMP)
	@mkdir -p build
	@$(PYTEST) tests/slurm >build/test-slurm.log 2>&1 & slurm=$$!; trap "kill $$slurm" INT TERM; \
	$(PYTEST) --ignore tests/slurm 2>&1 | tee build/test.log; code=$${PIPESTATUS[0]}; \
	echo "tests/slurm:"; wait $$slurm || code=1; cat build/test-slurm.log; \
	grep -hE '^(FAILED|ERROR) ' build/test.log build/test-slurm.log; exit $$code

faults: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.campaign build/faults/$$(date +%Y%m%d-%H%M%S) --kills 200

gpu: $(STAMP)
	$(BIN)/python -m tests.gpu

clean:
	rm -rf .venv build *.egg-info .pytest_cache
