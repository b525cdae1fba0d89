# Every target makes what it needs: `make demo` and `make test` are all that a fresh machine has to be told.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Tensors come and go with every step: keep their memory, rather than handing it back and faulting it in again.
export MALLOC_MMAP_MAX_ := 0
export MALLOC_TRIM_THRESHOLD_ := 8000000000
export MALLOC_TOP_PAD_ := 268435456

.DELETE_ON_ERROR:
.PHONY: help install demo demo_real test format clean

help: ## show this list
	@grep -hE '^[a-z_]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED) ## make the environment in .venv, with the tools of development

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# What a finished test of a run gives, $(1) the run's folder and $(2) its data's: a film of one video and a report.
define show
	$(BIN)/instanceformer evaluate $(2)/valid.json $(1)/results.json
	$(BIN)/python scripts/render_results.py $(2)/valid.json $(1)/results.json --images $(2)/JPEGImages \
		--output $(1)/film.mp4 --sheet $(1)/film.png
	$(BIN)/instanceformer report $(1) --output $(1)/report.html --videos 24
	@echo 'Open $(1)/report.html in a browser. The film, $(1)/film.mp4, has the ground truth on the left.'
endef

demo: runs/demo/results.json ## synthetic videos, a short training on the CPU, a test, a film, a report: a quarter of an hour
	$(call show,runs/demo,data/demo)

demo_real: runs/demo_real/results.json ## the same with real videos: DAVIS=FOLDER, and WEIGHTS=FILE where nothing can be downloaded
	$(call show,runs/demo_real,data/davis-mini)

data/demo/valid.json: | $(INSTALLED)
	$(BIN)/instanceformer synthesize data/demo --overwrite

ifeq ($(MAKECMDGOALS)$(DAVIS)$(wildcard data/davis-mini/valid.json),demo_real)
$(error found no data/davis-mini, expected the folder of DAVIS 2016 or 2017 as unpacked; run make demo_real DAVIS=FOLDER)
endif

data/davis-mini/valid.json: | $(INSTALLED)
	$(BIN)/python scripts/davis_mini.py '$(DAVIS)' data/davis-mini

# A training that was interrupted goes on where it was; one that is complete but out of date starts again.
FIT = $(BIN)/instanceformer fit $(if $(wildcard $@),--overwrite)

runs/demo_frames/.trained: data/demo/valid.json configs/demo.yaml configs/demo_frames.yaml
	$(FIT) --config configs/demo.yaml --config configs/demo_frames.yaml
	touch $@

runs/demo/.trained: runs/demo_frames/.trained
	$(FIT) --config configs/demo.yaml
	touch $@

runs/demo/results.json: runs/demo/.trained
	$(BIN)/instanceformer test --config configs/demo.yaml --trainer.devices 1 --trainer.strategy auto

REAL := --config configs/davis_mini.yaml --config configs/demo_real.yaml

runs/demo_real/.trained: data/davis-mini/valid.json configs/davis_mini.yaml configs/demo_real.yaml
	$(FIT) $(REAL) $(if $(WEIGHTS),--model.backbone_weights '$(WEIGHTS)')
	touch $@

runs/demo_real/results.json: runs/demo_real/.trained
	$(BIN)/instanceformer test $(REAL)

test: $(INSTALLED) ## format, lint, types and the whole test suite
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist worksteal

format: $(INSTALLED) ## format the code and mend what the linter can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove the environment, the demo's data and all runs
	rm -rf $(VENV) data/demo runs
