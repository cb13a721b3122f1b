# Everything runs inside .venv, which the first target that needs it makes from requirements.lock.
# Needed beforehand: make and Python 3.11 or newer (another one: make PYTHON=python3.12 ...).

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
TESTERS := 2
WHEELS := build/dist
PIP    := $(BIN)/python -m pip --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-full test-oldest test-newest check wheel bench bench-engines models format setup clean

help:
	@echo "make demo       see it work on this machine, without any download of models"
	@echo "make test       style, types, import rules, wheel, tests"
	@echo "make test-full  the same with the wide grids"
	@echo "make test-oldest, make test-newest  exactness, integration and compiled code with the oldest and the"
	@echo "                newest transformers and numba that pyproject.toml allows, in environments of their own"
	@echo "make check      style, types and import rules only"
	@echo "make bench      timed comparison with transformers' own generate"
	@echo "make bench-engines  timed comparison with llama.cpp and vLLM on the same weights; installs both below build/"
	@echo "make models     which architectures are exact, written into docs/models.md"
	@echo "make format     let ruff mend what it can"
	@echo "make clean      remove environments, builds and caches"

demo: $(STAMP)
	@$(BIN)/paceline demo $(ARGS)

test: check wheel
	$(BIN)/python -m pytest -n $(TESTERS) $(ARGS)

test-full: check wheel
	$(BIN)/python -m pytest -n $(TESTERS) -m "wide or not wide" $(ARGS)

test-oldest test-newest: test-%: .venv-%/.installed
	.venv-$*/bin/python -m pip freeze | grep $(FREE:%=-e '^%==')
	.venv-$*/bin/python -m pytest -n $(TESTERS) tests/exactness tests/integration tests/unit/models/compiled $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: $(STAMP)
	@$(BIN)/python benchmarks/versus_transformers.py $(ARGS)

bench-engines: $(STAMP)
	@$(BIN)/python benchmarks/versus_engines.py $(ARGS)

models: $(STAMP)
	@$(BIN)/python scripts/models_table.py $(ARGS)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# --- the environment ------------------------------------------------------------------------------

setup: $(STAMP)

VERSION_OF := -c 'import sys; print(*sys.version_info[:2])'

$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "paceline needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | tail -n 1). Name another: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "paceline needs Python's venv and ensurepip modules; '$(PYTHON)' lacks them (Debian, Ubuntu: apt install python3-venv)." >&2; exit 1; }
	@[ "$$($(BIN)/python -m pip --version >/dev/null 2>&1 && $(BIN)/python $(VERSION_OF))" = "$$($(PYTHON) $(VERSION_OF))" ] || { \
	  echo "Making $(VENV) with $$($(PYTHON) --version)."; $(PYTHON) -m venv --clear $(VENV); }
	@echo "Installing requirements.lock into $(VENV): some minutes; about 2 GB on disk with a CPU build of torch, several GB with a CUDA build."
	@$(PIP) install -r requirements.lock
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@
	@echo "Installed."

# --- transformers and numba at either end of their ranges, everything else as locked ---------------

# llvmlite and numpy are those that pip finds for numba.
FREE := transformers numba llvmlite numpy
END_oldest := s/^ *"(transformers|numba)>=([0-9.]+).*/\1==\2/p
END_newest := s/^ *"((transformers|numba)>=[^"]*)".*/\1/p

.venv-oldest/.installed .venv-newest/.installed: .venv-%/.installed: pyproject.toml requirements.lock
	@echo "Installing requirements.lock with the $* transformers and numba into .venv-$*: it takes as long and as much space as .venv."
	@$(PYTHON) -m venv --clear .venv-$*
	@grep -v $(FREE:%=-e '^%==') requirements.lock >.venv-$*/requirements.txt
	@sed -n -E '$(END_$*)' pyproject.toml >>.venv-$*/requirements.txt
	@.venv-$*/bin/python -m pip --quiet --disable-pip-version-check install -r .venv-$*/requirements.txt
	@.venv-$*/bin/python -m pip --quiet --disable-pip-version-check install --no-deps --no-build-isolation --editable .
	@touch $@

# --- the wheel: builds with what is installed, and holds every file of the package -----------------

define WHEEL_CHECK
import pathlib, sys, zipfile
[wheel] = pathlib.Path("$(WHEELS)").glob("*.whl")
inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("paceline/")}
files = (path for path in pathlib.Path("src/paceline").rglob("*") if path.is_file())
wanted = {path.relative_to("src").as_posix() for path in files
          if path.suffix != ".part" and "__pycache__" not in path.parts and not path.name.startswith(".")}
if inside != wanted:
    sys.exit(f"{wheel}: missing {sorted(wanted - inside)}, unexpected {sorted(inside - wanted)}")
if "paceline/py.typed" not in inside or not any(name.endswith(".jsonl") for name in inside):
    sys.exit(f"{wheel}: holds no py.typed or no prompts (*.jsonl)")
print(f"{wheel}: complete, {len(inside)} files")
endef

wheel: export WHEEL_CHECK := $(WHEEL_CHECK)
wheel: $(STAMP)
	@rm -rf build/lib build/bdist.* $(WHEELS) src/*.egg-info/SOURCES.txt && mkdir -p $(WHEELS)
	@$(BIN)/pyproject-build --no-isolation --wheel --outdir $(WHEELS) . >build/wheel.log 2>&1 || { cat build/wheel.log >&2; exit 1; }
	@$(BIN)/python -c "$$WHEEL_CHECK"
