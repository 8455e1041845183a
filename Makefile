# The two commands of the README are `make quickstart` and `make test`; both make their own environment first.
PYTHON ?= $(shell command -v python3.11 || echo python3)
BIN := .venv/bin
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 FLWR_TELEMETRY_ENABLED=0 RAY_USAGE_STATS_ENABLED=0 OMP_WAIT_POLICY=PASSIVE
SPEED := benchmarks/speed/results/1b1.json
SIZE := benchmarks/speed/results/7b.json benchmarks/speed/results/size-160m.json
CHROMIUM := $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)
SOME := $(if $(CHROMIUM),,-m "not browser")
CORES := $(shell nproc 2>/dev/null || echo 2)

.PHONY: quickstart test check fix docs bench clean

quickstart: .venv/ready
	$(OFFLINE) $(BIN)/glue run recipes/quickstart.yaml

test: .venv/ready
	@$(if $(CHROMIUM),,echo "there is no Chromium here: tests that look at reports in a browser are left out")
	$(OFFLINE) $(BIN)/python -m pytest -n $(CORES) --dist loadfile $(SOME)

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m glue.docs --check
	$(BIN)/python -m benchmarks.speed table $(SPEED) --into README.md --check
	$(BIN)/python -m benchmarks.speed table $(SIZE) --into docs/size.md --check
	$(BIN)/python -m benchmarks.reproduction table --check

fix: .venv/ready
	$(BIN)/ruff check --fix .

docs: .venv/ready
	$(BIN)/python -m glue.docs
	$(BIN)/python -m benchmarks.speed table $(SPEED) --into README.md
	$(BIN)/python -m benchmarks.speed table $(SIZE) --into docs/size.md
	$(BIN)/python -m benchmarks.reproduction table

bench: .venv/ready
	$(OFFLINE) $(BIN)/glue run recipes/quickstart.yaml --full

.venv/ready: pyproject.toml constraints.txt
	@echo "making an environment in .venv; this takes a minute or more the first time"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache
