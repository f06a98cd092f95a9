# make demo      train and compare on real text (ARGS="..." are passed on; ARGS=--quick for a fast look)
# make test      lint, types and the CPU tests
# make gpu-test  the GPU tests, on a machine with a CUDA device
# PYTHON=python3 SYSTEM_SITE=1 uses the packages of that Python (a CUDA torch, say) and installs nothing else.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
SOURCES := pyproject.toml constraints.txt

ifdef SYSTEM_SITE
VENV_FLAGS := --system-site-packages
INSTALL = $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --no-index -e . \#
else
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e
endif

# A venv made from another venv's Python does not see that venv's packages; a .pth file shows them.
SITE := import sysconfig; print(sysconfig.get_path("purelib"))
LINK_SITE = $(PYTHON) -c '$(SITE)' > "$$($(BIN)/python -c '$(SITE)')/system_site.pth"

.PHONY: demo test lint gpu-test clean

demo: $(VENV)/.installed-demo
	$(BIN)/flash-sfa demo $(ARGS)

test: $(VENV)/.installed-test lint
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu-test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m gpu $(ARGS)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found; pass PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(if $(SYSTEM_SITE),$(LINK_SITE))

$(VENV)/.installed-demo: $(BIN)/python $(SOURCES)
	$(INSTALL) ".[demo]"
	@touch $@

$(VENV)/.installed-test: $(BIN)/python $(SOURCES)
	$(INSTALL) ".[test]"
	@touch $@ $(VENV)/.installed-demo

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
