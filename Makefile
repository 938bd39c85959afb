# Everything runs in .venv, which the first target that needs it builds.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_OUT ?= runs/demo
export JAX_PLATFORMS ?= cpu
# Freed memory is kept, in huge pages: given back, it is faulted in anew at every training step, a fifth of its CPU time.
KEEP_MEMORY := glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8000000000

.PHONY: demo demo-npu test lint clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[clips,dev,npu,sweep]"
	touch $@

demo: $(VENV)/installed
	GLIBC_TUNABLES=$(KEEP_MEMORY) $(BIN)/nd-jax demo --out $(DEMO_OUT) $(DEMO_FLAGS)

# Qualcomm's compiler and emulator come under Qualcomm's own licence: docs/hexagon.md.
$(VENV)/hexagon: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[hexagon]"
	touch $@

demo-npu: $(VENV)/hexagon
	[ -d $(DEMO_OUT)/bundle ] || $(MAKE) demo
	$(BIN)/nd-jax npu compile $(DEMO_OUT)/bundle --target sm8750 --target sc8380xp
	$(BIN)/nd-jax npu emulate $(DEMO_OUT)/bundle --target sm8750 --target sc8380xp --videos 5
	$(BIN)/nd-jax npu handover $(DEMO_OUT)/bundle --target sm8750 --out $(DEMO_OUT)/handover --overwrite

test: $(VENV)/installed
	$(BIN)/pytest -n 2 -m "not heavy and not peers"

lint: $(VENV)/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build dist *.egg-info runs .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
