# `make demo` and `make test` are for everybody; they do all of their own set-up and can be repeated.
BIN    := .venv/bin
APP    ?= 1
PORT   ?= 7860
export PYTHONUNBUFFERED = 1

# The Python that makes .venv: python3 where it is 3.10 to 3.12, else the first of these that is. `make install PYTHON=...` names one.
ifdef PYTHON
PYTHONS := $(PYTHON)
else
PYTHONS := python3 python3.11 python3.12 python3.10
endif
FITS := import sys, ensurepip, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))

.PHONY: help install demo test sync outputs screenshots browser clean

help:
	@echo "make demo            train on the shipped samples, evaluate, and open the chat page (APP=0: without the page; PORT=$(PORT))"
	@echo "make test            everything in sync, all notebooks, all tests"
	@echo "make install         only .venv with the medchat command in it (PYTHON=python3.12 to choose the Python)"
	@echo "make sync            after editing notebooks: clean them, export medchat/, write README.md"
	@echo "make outputs NB=...  run a notebook and keep its outputs (FLAGS=\"slow gpu\": those cells too)"
	@echo "make screenshots     the pictures of the chat page in nbs/images, with the run of make demo"
	@echo "make clean           remove what demo and the tests wrote; .venv stays"

install: .venv/.installed
	@echo "== medchat is ready: $(BIN)/medchat --help"

.venv/bin/uv:
	@python=; for p in $(PYTHONS); do \
	  if $$p -c '$(FITS)' 2>/dev/null; then python=$$p; break; fi; done; \
	if [ -z "$$python" ]; then \
	  echo "medchat needs Python 3.10, 3.11 or 3.12 with its venv module; tried: $(PYTHONS). Install one (Debian: apt-get install python3-venv), or name it: make install PYTHON=/path/to/python3.11" >&2; exit 2; fi; \
	echo "== Making .venv with $$python ($$($$python --version))"; \
	$$python -m venv .venv && $(BIN)/python -m pip install --quiet --disable-pip-version-check uv

.venv/.installed: settings.ini setup.py pyproject.toml | .venv/bin/uv
	@echo "== Installing medchat and its packages into .venv: about 6.5 GB, 1 to 10 minutes"
	@$(BIN)/uv pip install --python $(BIN)/python -e .
	@touch $@

.venv/.dev: .venv/.installed
	@echo "== Installing what the tests need"
	@$(BIN)/uv pip install --python $(BIN)/python -e '.[dev]'
	@touch $@

# Each command of the demo is shown before it runs, so that you can type it yourself.
run = @echo; echo "$$ medchat $(1)"; $(BIN)/medchat $(1)
TRAIN = --kinds vqa --turns-per-image 8 --vision-layers --learning-rate 6e-3 --warmup-steps 60 --batch-size 16 --gradient-accumulation 1 --max-steps 800

demo: .venv/.installed
	@rm -rf demo && mkdir demo
	$(call run,convert sample_data/phantoms --out demo/data --keep-splits)
	$(call run,train --data demo/data --base tiny-qwen2-vl --run demo/run $(TRAIN))
	$(call run,plot demo/run)
	$(call run,evaluate demo/run --data demo/data --split test)
ifeq ($(APP),0)
	@echo; echo "== Done. The chat page: $(BIN)/medchat app demo/run"
else
	$(call run,app demo/run --with-base --port $(PORT))
endif

test: .venv/.dev browser
	@echo "== Notebooks, medchat/ and README.md in sync?"
	@$(BIN)/python .ci/sync.py --check
	@echo "== Running all notebooks, two at a time"
	@OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --do_print --timing
	@echo "== Running all tests"
	@$(BIN)/python -m pytest

browser:
	@sh .ci/browser.sh

sync: .venv/.dev
	@$(BIN)/python .ci/sync.py

outputs: .venv/.dev
	@$(BIN)/python .ci/outputs.py $(NB) $(FLAGS)

screenshots: .venv/.dev browser
	@test -d demo/run || { echo "no demo/run to show. First: make demo APP=0" >&2; exit 2; }
	@mkdir -p nbs/images
	@MEDCHAT_SCREENSHOTS=nbs/images MEDCHAT_RUN=demo/run $(BIN)/python -m pytest tests/test_app.py -k "command_answers or from_an_upload"

clean:
	rm -rf demo .pytest_cache .hypothesis build dist *.egg-info
	find medchat nbs tests .ci -name __pycache__ -prune -exec rm -rf {} +
