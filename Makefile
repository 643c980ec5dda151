# From Memory to Alignment: the executable survey.  `make` alone lists the targets.
#   make book TORCH_INDEX=...   where PyTorch comes from, if not from pip's own index (README, "Install")
#   make book PYTHON=python3.12 another interpreter; without it the first fitting one on the path
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed
PINS := $(VENV)/constraints-but-torch.txt
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
HTML := _build/html/index.html

# One thread and no network wherever a number is stored or asserted (two processes at a time fill two cores)
export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false
OFFLINE := HF_HUB_OFFLINE=1 TQDM_DISABLE=1
BUNDLED = $(notdir $(patsubst %/,%,$(dir $(wildcard data/models/*/model.safetensors))))

.PHONY: help install book serve test lint lab notebooks models evaluate bench peers compat dist doctor clean
.PHONY: results-footprint results-kvcache results-quantization kvcache-addons reading-adapter qlora-adapter

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## */\t/' | awk -F'\t' '{printf "  make %-21s %s\n", $$1, $$2}'

# ---- environment -----------------------------------------------------------------------------------------

$(PY):
	@found=; for p in $(PYTHON) python3.11 python3.12 python3.13 python3 python; do \
	  if "$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; \
	  then found=$$p; break; fi; done; \
	if [ -z "$$found" ]; then echo "Python 3.11, 3.12 or 3.13 is needed: none found on the path"; exit 1; fi; \
	echo "making $(VENV) with $$found"; "$$found" -m venv $(VENV)

$(STAMP): pyproject.toml setup.py constraints.txt | $(PY)
	@# torch first: one that is there already stays; unpinned, pip would take gigabytes of GPU libraries
	@if $(PY) -c 'import torch' 2>/dev/null; then echo "torch is installed"; \
	else $(PIP) install torch==$(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),-c constraints.txt); fi
	@sed '/^torch==/d' constraints.txt > $(PINS)  # so that the next line leaves that PyTorch alone
	$(PIP) install -e '.[book,test]' -c $(PINS)
	@touch $@

install: $(STAMP)  ## make .venv and install the package with all that book and tests need

# ---- book ------------------------------------------------------------------------------------------------

book: $(STAMP)  ## build the book from the stored outputs and print where it is
	$(PY) tools/build_pages.py
	$(OFFLINE) $(VENV)/bin/jupyter-book build . -n -W --keep-going
	@echo "The book: $(abspath $(HTML))"

serve: book  ## the same, served on http://localhost:8000
	$(PY) -m http.server 8000 --directory _build/html

lab: $(STAMP)  ## JupyterLab on the chapters
	@$(PY) -c 'import jupyterlab' 2>/dev/null || $(PIP) install jupyterlab -c $(PINS)
	$(PY) -m jupyterlab --notebook-dir=chapters

notebooks: $(STAMP)  ## execute the notebooks whose code or sources changed (ONLY=path: that one, in any case)
	$(OFFLINE) $(PY) tools/run_notebooks.py $(if $(ONLY),--force $(ONLY))
	$(PY) tools/build_pages.py

# ---- tests -----------------------------------------------------------------------------------------------

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/codespell refimpl tests tools book $(wildcard chapters) README.md CHANGELOG.md

# The book is built first because some tests read the built pages; then one pytest run of two processes:
# unit tests, the package's doctests, and every notebook, executed.
test: lint book  ## all that CI runs
	$(OFFLINE) $(PY) -m pytest tests refimpl $(wildcard chapters) --nbval-lax --nbval-current-env \
	  --nbval-cell-timeout=150 -n 2 --dist loadscope

# ---- models and measurements -----------------------------------------------------------------------------

models: $(STAMP)  ## train the bundled models anew (BOOKS=dir: a folder of plain text)
	$(PY) data/pretrain.py $(if $(BOOKS),--books $(BOOKS))

evaluate: $(STAMP)  ## recompute every gate of the bundled models (QUICK=1: 200 items each)
	@set -e; for name in $(BUNDLED); do \
	  $(OFFLINE) $(PY) -m refimpl evaluate $$name $(if $(QUICK),--quick); done

bench: $(STAMP)  ## speed, as ratios to plain transformers and torch -> data/results
	$(OFFLINE) $(PY) data/bench.py
	$(OFFLINE) $(PY) data/footprint_bench.py
	$(OFFLINE) $(PY) data/kvcache_bench.py
	$(OFFLINE) $(PY) data/quantization_bench.py

# Peers that must not share our environment have one of their own; the head of a script says which. PEER is the
# Python of the one with llm-compressor. data/*_golden*.py make the arrays of tests/*/golden, each run by its peer's.
peers: $(STAMP)  ## cross-checks against peer libraries -> data/results (PEER=python adds chapter 4's)
	$(PY) data/peers.py
	$(PY) data/footprint_peers.py
	$(OFFLINE) $(PY) data/footprint_accelerate.py
	$(if $(PEER),$(OFFLINE) $(PY) data/quantization_peers.py --peer $(PEER))

# With GPU=1 an interrupted run goes on where it stopped: what build/footprint-gpu has of the same sources stays.
results-footprint: $(STAMP)  ## measure chapter 1's stored results anew; GPU=1 adds the GPU part
	$(OFFLINE) $(PY) data/footprint_bench.py
	$(if $(GPU),$(OFFLINE) $(PY) data/footprint_gpu.py --out build/footprint-gpu)
	$(if $(GPU),$(OFFLINE) $(PY) data/footprint_gpu.py --join build/footprint-gpu)

# The streams take an hour, the grid hours of one core. data/kvcache_peers.py wants an environment of its own: its head.
results-kvcache: $(STAMP)  ## measure chapter 5's stored results anew; GPU=1 adds the GPU part
	$(OFFLINE) $(PY) data/kvcache_grid.py --jobs 2
	$(if $(GPU),$(OFFLINE) $(PY) data/kvcache_gpu.py --out build/kvcache-gpu)
	$(if $(GPU),$(OFFLINE) $(PY) data/kvcache_gpu.py --join build/kvcache-gpu)

# The grid takes hours of one core; the GPU part ten minutes of one H200.
results-quantization: $(STAMP)  ## measure chapter 4's stored results anew; GPU=1 adds the GPU part
	$(OFFLINE) $(PY) data/quantization_grid.py --jobs 2
	$(OFFLINE) $(PY) data/quantization_models.py --jobs 2
	$(if $(GPU),$(OFFLINE) $(PY) data/quantization_gpu.py --out build/quantization-gpu)
	$(if $(GPU),$(OFFLINE) $(PY) data/quantization_gpu.py --join build/quantization-gpu)

.PHONY: results-quantization-trained
results-quantization-trained: $(STAMP)  ## trained systems of chapter 4, three models and seeds (JOBS=2, DEVICE=cuda)
	@set -e; for name in llama-nano llama-mini gpt2-mini; do \
	  $(OFFLINE) $(PY) data/quantization_trained.py --model $$name --jobs $(or $(JOBS),1) --device $(or $(DEVICE),cpu); done

kvcache-addons: $(STAMP)  ## train chapter 5's add-ons and the models of its experiments (wants a GPU)
	$(OFFLINE) $(PY) data/kvcache_adapters.py --out build/kvcache-dcp
	$(OFFLINE) $(PY) data/kvcache_llmlingua2.py --out build/kvcache-llmlingua2 --texts 8000 --steps 2000
	$(OFFLINE) $(PY) data/kvcache_trained_prompt.py --out build/kvcache-prompt --limit-s 600

reading-adapter: $(STAMP)  ## train llama-mini's adapter for new wording (wants a GPU)
	$(OFFLINE) $(PY) data/reading_adapter.py --out build/reading

qlora-adapter: $(STAMP)  ## train chapter 4's adapter, sixty facts on a base in NF4 (wants a GPU)
	$(OFFLINE) $(PY) data/quantization_adapter.py --out build/qlora

compat: $(STAMP)  ## the two ends of the supported versions -> data/results/compat.json
	$(PY) tools/compat.py

# ---- releases --------------------------------------------------------------------------------------------

dist: book  ## wheel, EPUB and a zip of the offline book -> dist/
	$(PY) tools/make_dist.py

doctor: $(STAMP)  ## versions, the PyTorch build and its size, threads, bundled models
	@$(PY) tools/doctor.py

clean:  ## remove what was built; the environment stays (rm -r .venv removes that)
	rm -rf _build build dist .ruff_cache .hypothesis *.egg-info
