# Everything runs in .venv, which the first target that needs it builds.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_OUT ?= runs/demo
export JAX_PLATFORMS ?= cpu

.PHONY: demo test lint clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[clips,dev]"
	touch $@

demo: $(VENV)/installed
	$(BIN)/nd-jax demo --out $(DEMO_OUT) $(DEMO_FLAGS)

test: $(VENV)/installed
	$(BIN)/pytest -n 2 -m "not heavy and not peers"

lint: $(VENV)/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build dist *.egg-info runs .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
