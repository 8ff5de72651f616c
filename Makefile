# Two commands on a fresh machine: `make demo` and `make test`. Each makes what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
SOURCES := setup.py pyproject.toml $(shell find csrc darkmatter_ext -type f -not -name '*.so' -not -path '*__pycache__*')

.PHONY: install demo test test-slow bench cuda-check gpu-check lint clean

install: $(VENV)/.installed

$(VENV)/.dependencies: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)" "setuptools>=77" wheel ninja pybind11 numpy
	touch $@

# The development extra brings the test and lint tools; the build sees the torch of the environment it runs in.
$(VENV)/.installed: $(VENV)/.dependencies $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation ".[dev]"
	touch $@

demo: install
	$(BIN)/darkmatter demo

# Unit tests and one small run of every experiment, in as many processes as there are processors, at most four.
PROCESSES := -n auto --maxprocesses 4 --dist loadgroup
test: install
	$(BIN)/pytest $(PROCESSES) -m "not slow and not gpu"

test-slow: install
	$(BIN)/pytest $(PROCESSES) -m "slow and not gpu"

# Peers side by side on this machine's CPU, about 20 minutes; wants a quiet machine.
bench: install
	$(BIN)/python benchmarks/run.py --out benchmarks/results/cpu.json

# Compiles every CUDA kernel for every supported architecture; needs nvcc, no GPU.
cuda-check: $(VENV)/.dependencies
	$(BIN)/python setup.py --quiet cuda_check

# Everything that needs a GPU, in ten minutes: build, tests with sanitizers, probe, benchmark; results in benchmarks/results.
# Needs a Python with a CUDA torch, pybind11, ninja, pytest, hypothesis: .venv where `make install` made it with one, else
# GPU_PYTHON=... (nothing is installed there, the libraries are built into the source folder). The last two steps try the
# fused kernel (sm_90a, off by default): under a time limit, because one that has never run may hang.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu-check:
	DARKMATTER_CUDA=1 $(GPU_PYTHON) setup.py --quiet build_ext --inplace
	export PYTHONPATH=.; failed=0; \
	$(GPU_PYTHON) -m pytest -q python_tests/test_gpu.py -m gpu --override-ini addopts= -rs --durations 5 || failed=1; \
	$(GPU_PYTHON) benchmarks/gpu_probe.py --out benchmarks/results || failed=1; \
	$(GPU_PYTHON) benchmarks/gpu.py --seconds 180 --out benchmarks/results || failed=1; \
	export DARKMATTER_CUDA_FUSED=1; \
	timeout 60 $(GPU_PYTHON) -m pytest -q python_tests/test_gpu.py -m gpu --override-ini addopts= -k "encoders or worst or tiles" || failed=1; \
	timeout 60 $(GPU_PYTHON) benchmarks/gpu.py --shapes B C --only encode --seconds 40 --label=-fused --out benchmarks/results || failed=1; \
	exit $$failed

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'python_tests/emulator')
	$(BIN)/pyright

clean:
	rm -rf $(VENV) build dist *.egg-info results
