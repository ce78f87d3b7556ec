# Two commands: `make run` measures, `make test` checks. Both make .venv on first use and need only
# Python >= 3.11, make and git. Another interpreter: make run PYTHON=python3.12
PYTHON ?= python3
SWEEP ?= sweeps/quick.yaml
NOTEBOOKS = $(wildcard notebooks/*.ipynb)
# Under hard memory limits, and served for real: a minute of processor time each.
LONG_NOTEBOOKS = notebooks/10_longest_prompt_and_batch.ipynb notebooks/11_scheduling.ipynb
BIN = .venv/bin
READY = .venv/.ready

.PHONY: run test test-long load gpu gpu-kit docs lab pair ui clean
.DEFAULT_GOAL = run

run: $(READY)
	$(BIN)/emoe model build
	$(BIN)/emoe data prepare
	@# The report also shows failed runs, so it is written either way; the exit code is the sweep's.
	$(BIN)/emoe sweep $(SWEEP); code=$$?; $(BIN)/emoe results import && $(BIN)/emoe report --hints && exit $$code

# Processes of one thread each, kernels and what they start included: threads of one process wait for each other at every
# product, and where a core is taken away they wait long. One process more than two cores need, since many tests wait. Whole
# files to a process: what their tests share is made once (groups by mark, `loadgroup`, are lost on pytest 9.2 and
# pytest-xdist 3.8). A cell's time limit ends one that hangs.
test test-long: export OMP_NUM_THREADS = 1
WORKERS = -n 3 --dist loadfile --no-loadscope-reorder
NBVAL = EMOE_HOME="$$PWD/build/notebooks" $(BIN)/python -m pytest $(WORKERS) -p no:cacheprovider \
  --nbval-lax --nbval-cell-timeout=1200

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/emoe model build
	$(BIN)/python -m pytest $(WORKERS)
ifneq ($(NOTEBOOKS),)
	$(NBVAL) $(filter-out $(LONG_NOTEBOOKS),$(NOTEBOOKS))
endif

# What `make test` has no time for; docs/testing.md says when it was last run, and with what result.
test-long: $(READY)
	$(BIN)/emoe model build
	$(BIN)/python -m pytest $(WORKERS) -m long
	$(NBVAL) $(LONG_NOTEBOOKS)
	$(MAKE) load

# guidellm wants other versions than constraints.txt has, so it gets an environment of its own.
load: $(READY)
	test -x .load/bin/guidellm || { $(PYTHON) -m venv .load && \
	  .load/bin/pip install --quiet guidellm==0.8.1 $$(grep ^torch== constraints.txt); }
	PATH="$$PWD/.load/bin:$$PATH" $(BIN)/python -m pytest -p no:xdist tests/bench/serving/test_load_generator.py

# For a machine with a GPU, PyTorch and transformers, and no network: its own Python runs this, no environment is made.
# Another device: make gpu DEVICE=cuda:1; one that rehearses the same here: make gpu DEVICE=cpu
DEVICE ?= cuda
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) scripts/gpu.py run --device $(DEVICE)

# What that machine may lack, into build/gpu-kit, at most 10 MB.
gpu-kit: $(READY)
	$(BIN)/python scripts/gpu.py kit

docs: $(READY)
	$(BIN)/python -m mkdocs build --strict
	@echo "Read it at http://127.0.0.1:8001 after: $(BIN)/python -m http.server --bind 127.0.0.1 --directory build/site 8001"

lab: $(READY)
	$(BIN)/jupyter lab notebooks

# Notebooks and their Python files in notebooks/source hold the same cells. The notebook wins: which one is newer means
# nothing after git has written both.
pair: $(READY)
	cd notebooks && ../$(BIN)/jupytext --quiet --to source//py:percent *.ipynb

ui: $(READY)
	@echo "Opens at http://127.0.0.1:5000; '$(BIN)/emoe report --hints' names the address of each sweep's runs, arranged."
	$(BIN)/emoe ui

clean:
	rm -rf .venv .load build dist reports .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	@echo "Kept: mlruns (your runs) and the cache of built models ('emoe cache list' shows it)."

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	         "Name another one: make run PYTHON=/path/to/python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@
