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
.PHONY: help install demo test format clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED) ## make the environment in .venv, with the tools of development

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: runs/demo/results.json ## synthetic videos, a short training on the CPU, a test, a film, a report: a quarter of an hour
	$(BIN)/instanceformer evaluate data/demo/valid.json runs/demo/results.json
	$(BIN)/python scripts/render_results.py data/demo/valid.json runs/demo/results.json --images data/demo/JPEGImages \
		--output runs/demo/film.mp4 --sheet runs/demo/film.png
	$(BIN)/instanceformer report runs/demo --output runs/demo/report.html --videos 24
	@echo 'Open runs/demo/report.html in a browser. The film, runs/demo/film.mp4, has the ground truth on the left.'

data/demo/valid.json: | $(INSTALLED)
	$(BIN)/instanceformer synthesize data/demo --overwrite

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
