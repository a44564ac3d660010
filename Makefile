# Two commands for a newcomer: `make demo` and `make test`. The rest is for the people who work on vitrim.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SITE := .venv-docs
READY := $(VENV)/.installed

N ?= 200

.PHONY: demo test tests slurm lint bench faults docs dist clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Run VTP at strengths 0 to 5 on the digits; print the table, write the curve, list the run folders.
demo: $(READY)
	$(BIN)/vitrim --multirun experiment=demo strength=0,1,2,3,4,5
	$(BIN)/vitrim-report outputs

# Lint beside the tests: on its own it leaves a core idle.
test: $(READY)
	$(MAKE) --jobs=2 --no-print-directory lint tests

tests: $(READY)
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m 'not slow and not gpu and not slurm'

# Run sweeps on a real SLURM of one node (Debian: apt-get install slurm-wlm munge).
slurm: $(READY)
	$(BIN)/python -m pytest -rs -m slurm tests/jobs/test_slurm.py

# Run the hooks of .pre-commit-config.yaml on all files.
lint: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pre-commit run --all-files

bench: $(READY)
	$(BIN)/python -m tests.bench

# Print a table of kills, signals, full disks, damage and hostile files, with N kills of whole runs.
# Nightly: python -m tests.faults.cuts --cases 50000, random plans cut against masked.
faults: $(READY)
	$(BIN)/python -m tests.faults --kills $(N)

# Build the documentation into site/; a dead link or anchor is an error.
docs: $(SITE)/.installed
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --quiet

# Build the wheel and the source archive into dist/, and check both.
dist: $(SITE)/.installed
	rm -rf dist
	$(SITE)/bin/python -m build --no-isolation
	$(SITE)/bin/twine check --strict dist/*
	$(SITE)/bin/check-wheel-contents dist/*.whl

# What these two need, without vitrim and torch: two extras of pyproject.toml.
$(SITE)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(SITE)
	$(SITE)/bin/python -c "import tomllib; extras = tomllib.load(open('pyproject.toml', 'rb'))['project']\
	['optional-dependencies']; print(*extras['docs'], *extras['release'], sep='\n')" > $(SITE)/needed.txt
	$(SITE)/bin/python -m pip install --quiet --constraint constraints.txt --requirement $(SITE)/needed.txt
	touch $@

clean:
	rm -rf $(VENV) $(SITE) site dist outputs
