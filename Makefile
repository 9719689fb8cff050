# make demo, make test: a set-up of what each needs, kept in VENV. A second run sets nothing up
# again, and compiles only if the sources or the settings have changed. README.md says more.

PYTHON ?= python3
TORCH ?= torch
VENV ?= .venv
ARGS ?=

# Of pytest: as many processes as cores, which take the next file of tests each. ARGS="-n 0" is one.
in_parallel = -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
python = $(VENV)/bin/python
pip = $(python) -m pip --disable-pip-version-check
supported_torch = $(shell sed -n 's/^OLDEST_TORCH = (\(.*\), \(.*\))/torch>=\1.\2/p' setup.py)

.PHONY: help demo test bench gpu-check lint format debug torch build clean FORCE
.DELETE_ON_ERROR:

define HELP
make demo       set up in $(VENV); train a classifier with both softmaxes, compare them, time them
make test       the same set-up and what the tests need, then all tests
make bench      each case of the benchmark against torch, on a quiet machine
make gpu-check  on a GPU: build, tests, compute-sanitizer, benchmark
make lint       clang-format, ruff and mypy over all tracked files
make format     let the formatters mend what they can
make debug      a second build with sanitizers, and all tests on it
make clean      remove what builds have made, but not $(VENV)

Variables: TORCH=torch==2.13.0 (what to give to pip), PYTHON=, VENV=, ARGS= (passed on).
README.md has the rest.
endef

help:
	@$(info $(HELP)):

demo: build/extension $(VENV)/.installed-demo
	$(python) examples/digits.py $(ARGS)

test: build
	$(python) -m pytest $(in_parallel) $(ARGS)

bench: build/extension $(VENV)/.installed-demo
	$(python) -m benchmarks $(ARGS)

# With GPU_PYTHON= that Python does it all as it is, without pip or a virtual environment.
gpu-check:
ifndef GPU_PYTHON
	@nvidia-smi -L || { echo "gpu-check needs an NVIDIA GPU, and nvidia-smi shows none" >&2; exit 2; }
	$(MAKE) build FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-$$( \
	  nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)}"
endif
	$(or $(GPU_PYTHON),$(python)) -m benchmarks.gpu_check $(ARGS)

lint: $(VENV)/.installed-dev
	PATH="$(abspath $(VENV))/bin:$$PATH" pre-commit run --all-files --show-diff-on-failure

format: $(VENV)/.installed-dev
	git ls-files -co --exclude-standard '*.h' '*.cuh' '*.cpp' '*.cu' \
	  | xargs -r $(VENV)/bin/clang-format -i
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# A build of its own with warnings as errors and sanitizers, and all tests on it. Of the CPU kernels it
# has those that are in use, which take minutes to compile so. libstdc++ is loaded early too: without it
# the address sanitizer finds no exceptions to intercept.
debug: build
	SOFTMAX_EXT_DEBUG=1 SOFTMAX_EXT_ISAS="$$($(python) -c 'import softmax_ext; print(softmax_ext.build_info().cpu_isa)')" \
	  $(python) setup.py -q build --build-lib build/debug/lib \
	  build_ext --build-temp build/debug/objects
	cd build/debug/lib && \
	  LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0:protect_shadow_gap=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(abspath $(VENV))/bin/python -m pytest $(CURDIR)/tests $(in_parallel) $(ARGS)

clean:
	rm -rf build dist *.egg-info compile_commands.json softmax_ext/_C.*.so softmax_ext/_build.json
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# The set-up by its steps: the virtual environment with torch and what a build needs; all that the
# tests need.
torch: $(VENV)/.torch

build: build/extension $(VENV)/.installed-test

# $(call record,TEXT): rewrites the target, and so makes it newer than what depends on it, only if
# the text is not what it was.
record = @mkdir -p $(@D); echo '$(1)' | cmp -s - $@ || echo '$(1)' > $@

$(VENV)/.wanted: FORCE
	$(call record,$(PYTHON) $(TORCH))

build/settings: FORCE
	$(call record,$(abspath $(VENV)) $(FORCE_CUDA)/$(FORCE_CPU)/$(TORCH_CUDA_ARCH_LIST)/$(CUDA_HOME))

# Where Debian's python3-venv is missing, the pip of PYTHON stands in for it. An index that TORCH
# names need not have more than torch.
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
	$(pip) install $$WANTED "$(supported_torch)"
	$(pip) install "setuptools>=77" wheel ninja pybind11 numpy
	@touch $@

# Compiled in place, where the editable installation finds it, and only as far as need be.
build/extension: $(VENV)/.torch build/settings setup.py $(shell find csrc)
	$(python) setup.py -q build_ext --inplace
	@touch $@

# The tests try the demo too.
$(VENV)/.installed-test: extras = test,demo
$(VENV)/.installed-%: extras = $*
$(VENV)/.installed-%: $(VENV)/.torch setup.py pyproject.toml | build/extension
	$(pip) install --no-build-isolation -e ".[$(extras)]"
	@touch $@
