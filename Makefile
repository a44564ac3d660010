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

# Compress the digits' network by VTP and by the joint method; print the table, write the curves.
demo: $(READY)
	$(BIN)/vitrim --multirun experiment=demo strength=0,1,2,3,4,5 sweep.jobs=2
	$(BIN)/vitrim --multirun experiment=demo/joint strength=1,3,5 sweep.jobs=2
	$(BIN)/vitrim-report outputs --html --wandb disabled
	@printf '%s\n' '' \
	'What was done: a small vision transformer was trained on handwritten digits ("dense"), trained on for' \
	'as long as the compressed ones were ("control"), and compressed in two ways at several strengths: "vtp"' \
	'learns which dimensions to remove and fine-tunes; "joint" removes and repairs without any training.' \
	'What is where: the folders above hold a compact network (model.safetensors), what was removed' \
	'(plan.json) and the numbers (report.json); outputs/report/report.html has all tables and figures.' \
	'What to try next, with a network and images of your own (docs/own_network.md):' \
	'  $(BIN)/vitrim model=timm model.name=deit3_small_patch16_224 data=none target.macs=0.6' \
	'  $(BIN)/vitrim method=joint target.macs=0.6 model=vit_tiny model.checkpoint=WEIGHTS \' \
	'    data=imagefolder data.root=IMAGES'

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
