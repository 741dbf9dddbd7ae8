# Two commands do all the set-up:  make serve   and   make test
PYTHON ?= python3
VENV   ?= .venv
HOST   ?= 127.0.0.1
PORT   ?= 8000
MODEL  ?=
ARGS   ?=

RUN = $(VENV)/bin/

.PHONY: help serve test check bench clean

help:
	@echo "make serve   serve the bundled model on http://$(HOST):$(PORT)   (PORT=, MODEL=, ARGS= pass through)"
	@echo "make test    every check: ruff, mypy, pytest"
	@echo "make bench   tokens/s of the bare engine against HTTP streaming, at 1, 8 and 32 streams"
	@echo "make clean   remove the virtual environment and caches"

$(VENV)/serve.stamp: pyproject.toml constraints.txt deploy/setup.sh
	PYTHON="$(PYTHON)" sh deploy/setup.sh "$(VENV)"
	@touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt deploy/setup.sh
	PYTHON="$(PYTHON)" sh deploy/setup.sh "$(VENV)" dev
	@touch $(VENV)/serve.stamp $@

serve: $(VENV)/serve.stamp
	@exec $(RUN)millrace serve --host $(HOST) --port $(PORT) $(if $(MODEL),--model "$(MODEL)") $(ARGS)

test: $(VENV)/dev.stamp
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)mypy
	$(RUN)pytest

bench: $(VENV)/dev.stamp
	$(RUN)python -m loadtests.bench $(ARGS)

clean:
	rm -rf "$(VENV)" .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
