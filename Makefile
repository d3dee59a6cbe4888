# Every verb of the project. Each creates or refreshes .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Programs start hundreds of times in a verb. Each would compile the modules again if the shell forbids to keep bytecode.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test serve gpu-check bench faults fuzz pictures audit lint format clean
.DEFAULT_GOAL := help

help:  ## list the verbs
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

# pip resolves torch by itself first: a range inside another package's requirements would let it pick a newer build.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("dpo-service needs Python 3.11.4 or newer") if sys.version_info < (3, 11, 4) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[worker,test]'
	@touch $@

demo: $(READY)  ## train a model from preferences, end to end, over HTTP (under 5 minutes on 2 cores)
	$(BIN)/python -m demo

serve: $(READY)  ## the API and one worker in the foreground; Ctrl-C drains it
	$(BIN)/dpo serve

# An older transformers in a folder of its own. Tests load models that were made here with it.
OLDER := $(VENV)/transformers-4
$(OLDER): | $(READY)
	$(BIN)/pip install --quiet --target $@ --no-deps transformers==4.57.6 tokenizers==0.22.2 huggingface-hub==0.36.2

# `make test COVERAGE=1` also measures branch coverage, and fails below its floor. It takes a third longer.
# A process of tests that dies ends the verb at once: pytest-xdist would wait for its tests for ever.
# As root on Debian it installs missing servers by apt. `make test INSTALL=0` installs nothing.
INSTALL := 1
test: $(READY) $(OLDER)  ## every test, real PostgreSQL and Redis processes included
	@INSTALL=$(INSTALL) sh tests/helpers/servers.sh
	$(BIN)/python -m pytest --numprocesses=3 --max-worker-restart=0 --dist=loadscope --no-loadscope-reorder $(if $(COVERAGE),--cov)

# The versions that current CUDA images carry. This build of torch has several gigabytes, and runs without a GPU too.
CUDA := $(VENV)/cuda
$(CUDA)/.ready: | $(READY)
	$(PYTHON) -m venv $(CUDA)
	$(CUDA)/bin/pip install --quiet torch==2.11.0
	$(BIN)/pip freeze --exclude-editable --exclude torch --exclude transformers --exclude huggingface-hub > $(CUDA)/others.txt
	$(CUDA)/bin/pip install --quiet --no-deps --requirement $(CUDA)/others.txt transformers==5.17.0 huggingface-hub==1.33.0
	@touch $@

# Programs of their own, and what only they use, are not counted: tests run them as processes.
UNCOUNTED := */__main__.py,*/device_check.py,*/rank_processes.py,*/distributed.py,*/tokens.py
gpu-check: $(READY) $(CUDA)/.ready  ## the trainer's tests with a CUDA build of torch, and how much of it they run (an hour)
	PYTHONPATH=. $(CUDA)/bin/python -m pytest -W 'ignore:`torch.jit.script` is deprecated:DeprecationWarning' tests/unit/trainer
	$(BIN)/python -m pytest --numprocesses=3 tests/unit/trainer --cov=worker.trainer --cov-config=/dev/null --cov-report=
	$(BIN)/coverage report --rcfile=/dev/null --show-missing --skip-covered --fail-under=95 --omit='$(UNCOUNTED)'

bench: $(READY)  ## measure the engine's speed beside TRL, in one run
	$(BIN)/python -m bench

faults: $(READY)  ## inject every fault 20 times into running trainings, on two clusters at once (an hour)
	@sh tests/helpers/servers.sh
	DPO_STATE_MACHINE_STEPS=10000 $(BIN)/python -m pytest tests/integration/test_life_of_jobs.py
	$(BIN)/python -m tests.faults --times 20

fuzz: $(READY)  ## feed any bytes to the dataset reader (an hour)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[fuzz]'
	$(BIN)/python -m tests.fuzz --minutes 60

pictures: $(READY)  ## take the pictures of docs/ again, from the dashboard in a real browser
	@sh tests/helpers/servers.sh
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[pictures]'
	DASHBOARD_PICTURES=docs/images $(BIN)/python -m pytest tests/acceptance/test_dashboard.py

audit: $(READY)  ## find known weaknesses of dependencies (pip-audit) and of this code (bandit)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[audit]'
	$(BIN)/bandit --quiet --recursive --severity-level medium --configfile pyproject.toml app worker migrations
	$(BIN)/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt

lint: $(READY)  ## ruff, mypy strict, and which module may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(READY)  ## rewrite the code the way lint wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and the embedded default's data
	rm -rf $(VENV) .dpo
