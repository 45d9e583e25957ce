# make demo   a small real model with torch's attention and with cute_flash's, compared
# make test   every test; no GPU needed. Of the proofs that tests/proofs.txt has a tenth, drawn anew in every run
# make prove  every proof, and tests/proofs.txt anew
# make lint   ruff
#
# PYTHON   the interpreter (>= 3.10) that .venv is made from
# ARCH     the GPU that is emulated where none is found: sm80 for the demo, all trees for the tests
# JOBS     test processes
# SEED     draws the tenth of the proofs that an earlier run drew

PYTHON ?= python3
JOBS ?= auto

venv := .venv
python := $(venv)/bin/python
pytest := $(python) -m pytest -n $(JOBS) --dist worksteal
install := $(python) -m pip install --disable-pip-version-check -c constraints.txt
requirements := pyproject.toml setup.py constraints.txt

.PHONY: demo test prove lint

demo: $(venv)/.demo
	HF_HUB_OFFLINE=1 $(python) -m cute_flash demo --arch $(or $(ARCH),sm80)

test: $(venv)/.test
	$(pytest) $(if $(ARCH),--arch $(ARCH)) $(if $(SEED),--proof-seed $(SEED))

prove: $(venv)/.test
	rm -f tests/proofs.txt
	$(pytest) --prove

lint: $(venv)/.test
	$(python) -m ruff check .

$(venv)/.demo: $(requirements) | $(python)
	@echo "== installing cute_flash and a small model (torch is the large download) =="
	$(install) -e '.[demo]'
	@touch $@

$(venv)/.test: $(requirements) | $(python)
	@echo "== installing cute_flash, a small model and the tests' tools (torch is the large download) =="
	$(install) -e '.[demo,test]'
	@touch $@ $(venv)/.demo

$(python):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "Python >= 3.10 is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1); try make PYTHON=python3.12"; exit 1; }
	@echo "== making $(venv) with $$($(PYTHON) --version) =="
	$(PYTHON) -m venv $(venv)
