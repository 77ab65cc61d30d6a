# The commands of this repository: run `make` to list them.

PROFILE ?= cpu
SEEDS ?=
JOBS ?=
RESULTS ?=
PYTHON ?=
DEVICE ?=

# Checked when make starts, before any set-up.
profiles := smoke cpu gpu paper
ifeq ($(filter $(PROFILE),$(profiles)),)
$(error PROFILE is '$(PROFILE)', but must be one of: $(profiles))
endif
is_count = $(shell printf %s '$(subst ','\'',$(1))' | grep -xE '0*[1-9][0-9]*')
$(foreach name,SEEDS JOBS,$(if $($(name)),$(if $(call is_count,$($(name))),,\
  $(error $(name) is '$($(name))', but must be a whole number of 1 or more))))

python := .venv/bin/python
pytest = OMP_NUM_THREADS=1 $(python) -m pytest --numprocesses 4 --dist worksteal
which = --profile "$(PROFILE)" $(if $(SEEDS),--seeds "$(SEEDS)") $(if $(RESULTS),--results "$(RESULTS)")
how = $(which) $(if $(JOBS),--jobs "$(JOBS)")

# If a run fails, the table is still written, but make fails. Ctrl-C ends both.
define train_and_tabulate
trap 'exit 130' INT; status=0; \
$(python) -m experiments run $(1) $(how) || status=$$?; \
$(python) -m analysis $(1) $(which) || status=$$?; \
exit $$status
endef

.DEFAULT_GOAL := help
.PHONY: help setup reproduce-table1 tune-table1 reproduce-table2 tune-table2 reproduce-table3 reproduce-table4 reproduce-all theory tables figures report check plan submit status test test-fast test-rare package test-package docs notebook bench soak fuzz lint format lock clean test-integrations

help: ## List these commands
	@awk 'BEGIN { FS = ":.*## " } \
	  /^##@ / { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z0-9-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 } \
	  /^#= / { printf "  %s\n", substr($$0, 4) }' $(MAKEFILE_LIST)

##@ Reproduce the paper
reproduce-table1: setup ## Train the missing runs of Table 1, then write and print the table
	@$(call train_and_tabulate,table1)

tune-table1: setup ## The same for the grid that chose Table 1's hyper-parameters
	@$(call train_and_tabulate,table1-tuning)

reproduce-table2: setup ## Train the missing runs of Table 2 (texts), then write and print the table
	@$(call train_and_tabulate,table2)

tune-table2: setup ## The same for the grid that chose Table 2's hyper-parameters
	@$(call train_and_tabulate,table2-tuning)

reproduce-table3: setup ## Measure the flatness of Table 1's networks (trains missing ones), then write the table and figures
	@$(call train_and_tabulate,table3)

reproduce-table4: setup ## Time the steps of all methods, then write and print the table
	@$(call train_and_tabulate,table4)

#=      study-NAME         The same for a side study: micro_batches or rho; PROFILE=paper has more, see docs/results.md
study-%: setup
	@$(call train_and_tabulate,$*)

reproduce-all: setup ## Show how long everything takes, then run everything that is missing
	@$(python) -m experiments plan all $(how)
	@$(call train_and_tabulate,all)

theory: setup ## Simulate linear stability, then write predictions and simulations as a table and a figure
	@$(call train_and_tabulate,theory)

tables: setup ## Rebuild the committed tables and figures from the committed runs, without training
	$(python) -m analysis --from-committed --profile "$(PROFILE)" $(if $(RESULTS),--results "$(RESULTS)")

figures: tables ## The same: each figure is drawn with its table

report: tables ## The same: report.html is written with the tables

check: setup ## Check each distinct cell of every table at full size, before it costs GPU time: PROFILE=paper (half an hour)
	@$(python) -m experiments check all --profile "$(PROFILE)"

plan: setup ## List the runs of Table 1 that are done and those that would be trained
	$(python) -m experiments plan table1 $(how)

submit: setup ## Submit the missing runs of Table 1 to Slurm (for more, see python -m slurm)
	$(python) -m slurm submit table1 $(which)

status: setup ## Count the runs of Table 1: done, running, failed, missing
	$(python) -m experiments status table1 $(which)

##@ Work on the code
setup: ## Build .venv from requirements.lock, once; other targets do this when needed
	@PYTHON="$(PYTHON)" sh .ci/setup

test: setup ## Run the tests, four at a time with a core each (some wait for others); warnings are errors
	$(pytest) -m "not rare and not own_target"

test-fast: setup ## Run the tests except those marked slow
	$(pytest) -m "not slow and not rare and not own_target"

test-rare: setup ## Run the tests that make test leaves out: whole commands, ranks, kills, models of other libraries
	$(pytest) -m rare

test-integrations: setup ## Print how right the recipes for other libraries' loops are (installs these once; needs a network)
	@.ci/integrations

package: setup ## Build the source distribution and the wheel of msam in dist/, and check them
	rm -rf dist
	$(python) -m build --no-isolation --outdir dist . >build.log 2>&1 || { cat build.log; rm build.log; exit 1; }
	@rm build.log
	$(python) -m twine check --strict dist/*

test-package: package ## Test what is shipped: the tests inside the source distribution, the first page, types (3 minutes)
	$(python) -m pytest tests/package

docs: package ## Build the site in build/site/ without a network, and check every link (a minute)
	rm -rf build/site build/site-extra
	mkdir -p build/site-extra/downloads
	cp dist/*.whl build/site-extra/downloads
	$(python) -m sphinx --fail-on-warning --keep-going --quiet -c docs -d build/doctrees . build/site
	$(pytest) tests/site/test_site.py

notebook: setup ## Run the notebook of docs/, and check that it still shows what is committed (two minutes)
	$(pytest) tests/site/test_notebook.py

bench: setup ## Time msam.backward against other implementations and the bare passes (half an hour); DEVICE=cuda: on a GPU
	$(if $(DEVICE),$(python) -m benchmarks.gpu --device "$(DEVICE)",$(python) -m benchmarks.backward)
	$(if $(DEVICE),,$(python) -m benchmarks.loop)

soak: setup ## Kill training runs, pools and analyses at random times, damage records, print the outcomes (half an hour)
	$(python) -m tests.faults.soak

fuzz: setup ## Try msam.backward on 30,000 random cases, with faults, and on models of other libraries (40 minutes)
	OMP_NUM_THREADS=1 $(python) -m tests.msam.fuzz
	OMP_NUM_THREADS=1 $(python) -m tests.msam.fuzz --faults
	OMP_NUM_THREADS=1 $(python) -m tests.msam.zoo

lint: setup ## Check style, format, types and imports
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy
	.venv/bin/lint-imports

format: setup ## Fix style and format
	$(python) -m ruff check --fix .
	$(python) -m ruff format .

lock: ## Pin the dependencies in pyproject.toml again (needs uv; LOCK=--upgrade takes the newest versions)
	@command -v uv >/dev/null || { echo "make lock needs uv: install it with pip install uv." >&2; exit 1; }
	@sed -n '/^#/!q; p' requirements.lock >requirements.lock.new
	uv pip compile pyproject.toml --group dev --universal --fork-strategy fewest --annotation-style line \
	  --no-header --quiet $(LOCK) --output-file requirements.lock
	@cat requirements.lock >>requirements.lock.new
	@mv requirements.lock.new requirements.lock

clean: ## Remove caches and build products, but not results or .venv
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

##@ Variables
#= PROFILE=smoke|cpu|paper   the size of the runs: seconds, minutes (the default), GPUs
#= SEEDS=n                   seeds of each cell (default: the profile's number)
#= JOBS=n                    runs at a time (default: one per core)
#= RESULTS=folder            where runs and tables go (default: ./results)
#= DEVICE=cuda               where make bench runs (default: the CPU's own benchmark)
#= PYTHON=python3.12         the interpreter for .venv (default: the first of 3.11 to 3.14)
