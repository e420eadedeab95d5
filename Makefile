PYTHON ?= python3
VENV ?= .venv
OUTPUT ?= output/demo

PY = $(VENV)/bin/python
TREES = $(or $(DETECTRON2_DATASETS),datasets)/trees
STAMP = $(VENV)/.stageinteractor-installed
CONFIG = projects/stageinteractor/configs/stageinteractor_lite0_trees.py
SOURCES = projects configs tools tests

.PHONY: help install demo test test-slow test-all check verify audit lint format clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "  make %-10s %s\n", $$1, $$2}'
	@echo "  Variables: PYTHON=$(PYTHON) VENV=$(VENV) OUTPUT=$(OUTPUT)"

install: $(STAMP)  ## install everything into VENV, which is created or reused

# An environment without pip, left by an interrupted install or made by another tool, is completed
# and never recreated, because it may contain a torch that has to stay. Without the constraint, pip
# would replace that torch to get a newer torchvision, if torchvision is missing.
$(STAMP): setup.cfg pyproject.toml tools/install_detectron2.py
	@[ -x $(PY) ] || $(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	(3, 10) <= v < (3, 14) or sys.exit("Python 3.10 to 3.13 is needed and $(PYTHON) is %d.%d:" \
	" name another, for example make install PYTHON=python3.11" % v)'
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip >/dev/null 2>&1 \
	|| $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip freeze | grep '^torch==' > $(VENV)/torch-to-keep.txt || true
	$(PY) -m pip install -e '.[dev]' -c $(VENV)/torch-to-keep.txt
	$(PY) -m pip install --no-deps 'trackers>=2.6.1,<3'
	$(PY) tools/install_detectron2.py
	@touch $@

demo: $(STAMP)  ## train on real photographs, evaluate and draw: about 10 minutes on 2 cores
	$(PY) tools/prepare_trees.py
	STAGEINTERACTOR_TO_RESUME="$(strip make demo $(MAKEOVERRIDES))" \
	    $(PY) tools/train_net.py --config-file $(CONFIG) --resume train.output_dir=$(OUTPUT)
	$(PY) tools/train_net.py --config-file $(CONFIG) --eval-only \
	    train.init_checkpoint=$(OUTPUT)/model_best.pth train.output_dir=$(OUTPUT) \
	    dataloader.test.dataset.json_file=$(TREES)/val.json
	$(PY) tools/visualize.py training --metrics $(OUTPUT)/metrics.json \
	    --output $(OUTPUT)/training.png
	$(PY) tools/visualize.py results --annotations $(TREES)/val.json --images $(TREES)/images \
	    --predictions $(OUTPUT)/eval/coco_instances_results.json --output $(OUTPUT)/results.png \
	    --order spread
	@echo "Predictions, curves, checkpoint and log are in"
	@echo "$(OUTPUT)"

# Two test files at a time, with one thread each: more threads would wait for each other.
test: $(STAMP)  ## run the tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile

test-slow: $(STAMP)  ## the slow tests, which CI runs as well
	OMP_NUM_THREADS=1 $(PY) -m pytest -m slow -n 2 --dist loadfile

test-all: $(STAMP)  ## every test, also those that take many minutes and guard what seldom changes
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "slow or rare or not slow" -n 2 --dist loadfile

check: $(STAMP)  ## show what is installed and what is wrong with it
	$(PY) tools/check.py env

verify: $(STAMP)  ## compare what the model computes on this device with the authors' code
	$(PY) tools/check.py model

# Without a network, pip-audit ends with a traceback. With a mirror of the package index that knows
# no package, it ends with success; a missing numpy, which every real service knows, reveals that.
audit: $(STAMP)  ## list known vulnerabilities of the installed packages
	@$(PY) -m pip_audit --progress-spinner off > $(VENV)/audit.txt 2>&1; status=$$?; \
	if ! grep -q '^Found ' $(VENV)/audit.txt && grep -qE \
	'ConnectionError|ProxyError|SSLError|Timeout|ServiceError|Could not connect|^numpy .* not be audited' \
	$(VENV)/audit.txt; \
	then echo "Nothing was audited: no vulnerability service can be reached from here"; \
	else cat $(VENV)/audit.txt; exit $$status; fi

lint: $(STAMP)  ## check style, types and the direction of imports
	$(PY) -m ruff check $(SOURCES)
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

format: $(STAMP)  ## sort imports and fix what ruff can fix
	$(PY) -m ruff check --fix $(SOURCES)

clean:  ## remove caches, but no environments, datasets or outputs
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache stageinteractor.egg-info build
