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

# Three parts run beside each other, because one process of pytest keeps one core busy and the tests of the Slurm jobs mostly
# wait. Only one of them prints as it goes; what the others print comes after it, and what failed last. Tests on several ranks
# need both cores, so they come when the rest is done. One thread each, because the tests' small tensors take longer with more.
# In BESIDE tracking comes last, because its sender sets MLflow's address for the whole process.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
BESIDE := tests/faults tests/launch tests/pipeline/models tests/pipeline/tracking

test: $(STAMP)
	@mkdir -p build; rm -f build/test*.log
	@$(PYTEST) tests/slurm >build/test-slurm.log 2>&1 & slurm=$$!; \
	$(PYTEST) -m 'not ranks' $(BESIDE) >build/test-beside.log 2>&1 & beside=$$!; trap "kill $$slurm $$beside" INT TERM; \
	$(PYTEST) -m 'not ranks' --ignore tests/slurm $(BESIDE:%=--ignore %) 2>&1 | tee build/test.log; code=$${PIPESTATUS[0]}; \
	echo "$(BESIDE):"; wait $$beside || code=1; cat build/test-beside.log; \
	$(PYTEST) -m ranks --ignore tests/slurm 2>&1 | tee build/test-ranks.log; [ $${PIPESTATUS[0]} = 0 ] || code=1; \
	echo "tests/slurm:"; wait $$slurm || code=1; cat build/test-slurm.log; \
	grep -hE '^(FAILED|ERROR) ' build/test*.log; exit $$code

faults: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.campaign build/faults/$$(date +%Y%m%d-%H%M%S) --kills 200 --long

gpu: $(STAMP)
	$(BIN)/python -m tests.gpu

clean:
	rm -rf .venv build *.egg-info .pytest_cache
