# `make help` lists the targets. A new Debian machine needs git and make; `make` brings the rest.
# Downloads are pinned by hash: requirements-*.lock, tests/requirements-keylime.lock, tests/demo/requirements-model.lock.

VENV := .venv
PYTHON := $(VENV)/bin/python
PIP := $(PYTHON) -m pip --disable-pip-version-check --quiet --quiet
LOCKS := requirements-build.lock requirements-dev.lock
# Folders too: a module that went away has to go from the virtual environment.
SOURCES := pyproject.toml $(shell find oci_hook -name __pycache__ -prune -o \( -name '*.py' -o -name py.typed -o -type d \) -print)

# For the packages: of the distribution's own Python, whatever else is on the PATH.
PACKAGING := build/package/venv

.DELETE_ON_ERROR:
.PHONY: install demo test unit integration matrix gvisor machines packaging package man bench lint format lock clean help
.PHONY: host host-tests host-package

install: $(VENV)/.installed  ## system packages, virtual environment, this project in it (the default)

demo: install  ## the main job from beginning to end, on a real model; about a minute
	$(PYTHON) -m tests.demo

test: host-tests install  ## every test; the parts side by side
	$(PYTHON) -m tests.side_by_side unit integration matrix gvisor machines packaging

unit integration matrix gvisor machines packaging: host-tests install  ## one part of the tests
	$(PYTHON) -m tests.side_by_side $@

package: $(PACKAGING)/.ready  ## dist/scz-smm_VERSION_ARCH.deb and .rpm
	@echo 'make: building the packages'
	@$(PACKAGING)/bin/python packaging/build_package.py

# A peer that is missing is a line that says so. BENCH=--quick for a short run.
bench: install  ## how fast, beside cp and other programs: build/bench/bench.txt, .json and plots; about ten minutes
	-@packaging/prepare-host bench
	$(PYTHON) -m tests.bench all --text build/bench/bench.txt --json build/bench/bench.json --svg build/bench $(BENCH)

lint: install  ## ruff and mypy --strict
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy --strict oci_hook

format: install  ## let ruff rewrite the sources
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

man: install  ## manual pages and the shells' completions, into build/man and build/completions
	$(PYTHON) packaging/manual.py build/man
	$(PYTHON) packaging/completions.py build/completions

host:
	@packaging/prepare-host

host-tests:
	@packaging/prepare-host tests

host-package:
	@packaging/prepare-host package

# A virtual environment that was copied or moved here, or lost its Python, starts anew.
WORKS := grep -qs '^\#!$(CURDIR)/$(VENV)/' $(VENV)/bin/pip && $(PYTHON) -c 'import pip' 2>/dev/null
$(shell [ ! -e $(VENV)/.dependencies ] || { $(WORKS); } || rm -f $(VENV)/.dependencies)

$(VENV)/.dependencies: $(LOCKS) | host
	@{ $(WORKS); } || { echo 'make: virtual environment $(VENV)'; python3 -m venv --clear $(VENV); }
	@echo 'make: downloading and building what requirements-build.lock and requirements-dev.lock pin'
	@$(PIP) install --require-hashes --only-binary=:all: --requirement requirements-build.lock
	@$(PIP) install --require-hashes --no-build-isolation --requirement requirements-dev.lock
	@touch $@

$(PACKAGING)/.ready: requirements-build.lock requirements-package.lock | host-package
	@/usr/bin/python3 -m venv --clear $(PACKAGING)
	@$(PACKAGING)/bin/python -m pip --disable-pip-version-check --quiet --quiet install --require-hashes \
		--only-binary=:all: --requirement requirements-build.lock --requirement requirements-package.lock
	@touch $@

# Not editable: the hook runs from site-packages, as it does on a host. pip compiles the bytecode.
$(VENV)/.installed: $(VENV)/.dependencies $(SOURCES)
	@echo 'make: installing scz-smm into $(VENV)'
	@rm -rf build/lib build/bdist.* *.egg-info
	@$(PIP) install --force-reinstall --no-deps --no-build-isolation --no-index .
	@rm -rf build/lib build/bdist.* *.egg-info
	@touch $@

# One resolution, for the oldest Python that is supported; without the machine's own indexes and folders of wheels.
lock: | host  ## resolve the dependencies anew
	python3 -m venv --clear build/lock
	build/lock/bin/pip install --quiet pip-tools==7.6.2
	packaging/lock build/lock/bin/pip-compile

clean:  ## remove what make made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

help:  ## this list
	@sed -n 's/^\([a-z ]*\):[^#]*  ## \(.*\)/\1: \2/p' $(MAKEFILE_LIST) | sort
