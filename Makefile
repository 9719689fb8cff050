# make demo, make test: one set-up for both, kept in VENV. A second run sets nothing up again, and
# compiles only if the sources or the settings have changed. README.md says more.

PYTHON ?= python3
TORCH ?= torch
VENV ?= .venv
ARGS ?=

# Of pytest: as many processes as cores, which take the next file of tests each. ARGS="-n 0" is one.
in_parallel = -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
python = $(VENV)/bin/python
pip = $(python) -m pip --disable-pip-version-check
supported_torch = $(shell grep -oE -m 1 'torch>=[0-9.,<>=]+' pyproject.toml)

.PHONY: demo test bench gpu-check lint format debug torch build clean FORCE
.DELETE_ON_ERROR:

demo: build
	$(python) examples/digits.py $(ARGS)

test: build
	$(python) -m pytest $(in_parallel) $(ARGS)

bench: build
	$(python) -m benchmarks $(ARGS)

# With GPU_PYTHON= that Python does it all as it is, without pip or a virtual environment.
gpu-check:
ifndef GPU_PYTHON
	@nvidia-smi -L || { echo "gpu-check needs an NVIDIA GPU, and nvidia-smi shows none" >&2; exit 2; }
	$(MAKE) build FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-$$( \
	  nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)}"
endif
	$(or $(GPU_PYTHON),$(python)) -m benchmarks.gpu_check $(ARGS)

lint: build
	PATH="$(abspath $(VENV))/bin:$$PATH" pre-commit run --all-files --show-diff-on-failure

format: build
	git ls-files -co --exclude-standard '*.h' '*.cuh' '*.cpp' '*.cu' \
	  | xargs -r $(VENV)/bin/clang-format -i
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# A build of its own with warnings as errors and sanitizers, and all tests on it. libstdc++ is
# loaded early too: without it the address sanitizer finds no exceptions to intercept.
debug: build
	SOFTMAX_EXT_DEBUG=1 $(python) setup.py -q build --build-lib build/debug/lib \
	  build_ext --build-temp build/debug/objects
	cd build/debug/lib && \
	  LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0:protect_shadow_gap=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(abspath $(VENV))/bin/python -m pytest $(CURDIR)/tests $(in_parallel) $(ARGS)

clean:
	rm -rf build dist *.egg-info compile_commands.json softmax_ext/_C.*.so softmax_ext/_build.json
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# The set-up by its steps: the virtual environment with torch and what a build needs; all of it.
torch: $(VENV)/.torch

build: build/extension $(VENV)/.installed

# $(call record,TEXT): rewrites the target, and so makes it newer than what depends on it, only if
# the text is not what it was.
record = @mkdir -p $(@D); echo '$(1)' | cmp -s - $@ || echo '$(1)' > $@

$(VENV)/.wanted: FORCE
	$(call record,$(PYTHON) $(TORCH))

build/settings: FORCE
	$(call record,$(abspath $(VENV)) $(FORCE_CUDA)/$(FORCE_CPU)/$(TORCH_CUDA_ARCH_LIST)/$(CUDA_HOME))

# Where Debian's python3-venv is missing, the pip of PYTHON stands in for it.
$(VENV)/.torch: export WANTED = $(TORCH)
$(VENV)/.torch: $(VENV)/.wanted
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit( \
	  "softmax_ext needs Python 3.10 or newer; $(PYTHON) is " + sys.version.split()[0])'
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV) || { \
	  $(PYTHON) -m venv --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $(python) install pip; }
	@test "$$($(python) -V)" = "$$($(PYTHON) -V)" || { \
	  echo "$(VENV) has $$($(python) -V), $(PYTHON) is $$($(PYTHON) -V): remove $(VENV), or name another VENV="; \
	  exit 1; }
	$(pip) install $$WANTED "$(supported_torch)" "setuptools>=77" wheel ninja pybind11 numpy
	@touch $@

# Compiled in place, where the editable installation finds it, and only as far as need be.
build/extension: $(VENV)/.torch build/settings setup.py $(shell find csrc)
	$(python) setup.py -q build_ext --inplace
	@touch $@

$(VENV)/.installed: $(VENV)/.torch setup.py pyproject.toml | build/extension
	$(pip) install --no-build-isolation -e ".[test,demo,dev]"
	@touch $@
