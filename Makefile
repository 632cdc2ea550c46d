# Everything runs in .venv, which is set up on first use and again when the dependencies change.
PYTHON ?= python3
READY := .venv/.ready
RUN := .venv/bin/

# The compiled extension (setup.py says more): where there is a GPU all of it, elsewhere its part for the CPU.
export VMAE_BUILD ?= $(if $(shell command -v nvidia-smi),auto,$(if $(shell command -v c++),cpu,skip))
CUTLASS := nvidia-cutlass==4.2.0.0

.PHONY: setup demo test test-long machine lint bench bench-gpu resources cuda sanitize hub clean

setup: $(READY)

$(READY): requirements.lock pyproject.toml setup.py $(wildcard csrc/*.h csrc/*.cpp csrc/*.cuh csrc/*.cu) csrc/build.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vmae needs Python 3.11 or newer, found " + sys.version)'
	$(PYTHON) -m venv .venv
	$(RUN)python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(if $(filter auto force,$(VMAE_BUILD)),$(RUN)python -m pip install --quiet --disable-pip-version-check --no-deps $(CUTLASS))
	$(RUN)python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

demo: $(READY)
	$(RUN)vmae demo

# In the order of names: sorted by their number of tests, files with few long ones would come last, and cores wait.
test: $(READY)
	$(RUN)python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test-long: $(READY)
	$(RUN)python -m pytest -m long

# All tests of the kernels as they are compiled for GPUs, on the CPU, the convolution's too where nvcc is (some hours).
machine: $(READY)
	$(if $(shell command -v nvcc),$(RUN)python -m pip install --quiet --disable-pip-version-check --no-deps $(CUTLASS))
	$(RUN)python -m pytest -m machine --numprocesses auto --maxprocesses 8

lint: $(READY)
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)mypy
	$(RUN)check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(RUN)zizmor --offline --quiet .github/workflows

# Time, memory and arithmetic of kernels and steps beside peers, a quarter of an hour: benchmarks/README.md says more.
bench: $(READY)
	$(RUN)python benchmarks/run.py $(BENCH)

# The same on a GPU in nine minutes. Sets nothing up: PYTHON needs torch, triton, einops and pytest-benchmark.
bench-gpu:
	$(PYTHON) benchmarks/run.py --gpu $(BENCH)

# Compiles every configuration that the kernels' rules choose, for four GPU generations, on any machine (some minutes).
resources: $(READY)
	$(RUN)python -m vmae_kernels.resources --all

# Compiles csrc/ for every GPU generation, on any machine with nvcc, and checks the code (five minutes on two cores).
cuda: $(READY)
	$(RUN)python -m pip install --quiet --disable-pip-version-check --no-deps $(CUTLASS)
	$(RUN)python csrc/check.py build/cuda csrc/resources.md

# The kernels' GPU tests under NVIDIA's compute-sanitizer, which comes with the CUDA toolkit: reads and writes out of
# bounds, of memory that nothing was written to, and races between threads of a block (hours, where minutes without).
sanitize: $(READY)
	for tool in memcheck initcheck racecheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 --target-processes all \
			$(RUN)python -m pytest -m cuda tests/kernels/test_cuda.py tests/kernels/test_cuda_causal_conv3d.py \
			-k "0004frames or (against_float64 and (latents or patches or odd))" || exit 1; \
	done

# vmae_kernels as a kernel of Hugging Face's Hub, in build/hub.
hub: $(READY)
	$(RUN)python kernels/hub.py build/hub

clean:
	rm -rf .venv build dist *.egg-info
