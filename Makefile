# Every command a person runs. `make` alone prints them.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check

# `make train DATA="my text.txt" PRESET=smoke STEPS=100 ARGS="--seed 2"`
# These variables reach the shell through the environment exactly as written: a space, a quote or a
# dollar sign is part of the path or prompt. Only ARGS is shell text, so it can hold several arguments.
define as_written
override $(1) := $$(value $(1))
export $(1)
endef
$(foreach name,DATA INIT OUT PRESET STEPS MODEL PROMPT TASKS OP MACHINE,$(eval $(call as_written,$(name))))
override ARGS := $(value ARGS)

TRAIN_FLAGS = $${PRESET:+--preset "$$PRESET"} $${DATA:+--data "$$DATA"} \
	$${STEPS:+--steps "$$STEPS"} $${OUT:+--out "$$OUT"} $(ARGS)
# `make sample PROMPT="ROMEO:" MODEL=runs/smoke ARGS="--temperature 0 --num-samples 3"`
MODEL_FLAG = $${MODEL:+--model "$$MODEL"}
OP_FLAG = $${OP:+--op "$$OP"}
# One process per core. pytest-benchmark is off, as timings beside other processes mean nothing.
PYTEST = $(PY) -m pytest -p no:benchmark --numprocesses auto --dist loadfile \
	$${MACHINE:+--machine "$$MACHINE"} $${OP:+"tests/test_$$OP.py"} $(ARGS)

.PHONY: help setup setup-dev train finetune doctor tune sample eval demo test test-slow test-gpu bench bench-step \
	profile report numerics resources torture mutants matrix check fix clean
.DEFAULT_GOAL := help

##@ set up
help: ## list the targets
	@awk -F ':.*## ' '/^##@ / {print substr($$0, 5)} \
		/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.setup ## make .venv and install the exact pins, with the torch that fits the GPU
$(VENV)/.setup: requirements.txt
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@pin=$$(grep '^torch==' requirements.txt); torch=$$($(PY) -m training.torch_build); \
		[ "$$torch" != "$$pin" ] && $(PIP) "$$torch" || $(PIP) "$$pin"
	$(PIP) -r requirements.txt
	@touch $@

setup-dev: $(VENV)/.setup-dev
$(VENV)/.setup-dev: requirements-dev.txt $(VENV)/.setup
	$(PIP) -r requirements-dev.txt
	@touch $@

##@ train and try
train: setup ## train, sample, draw the loss curve, save the model (DATA= PRESET= STEPS= OUT= ARGS=)
	@$(PY) train.py $(TRAIN_FLAGS)

finetune: setup ## continue training GPT-2 from the hub, or INIT= (DATA= INIT= STEPS= OUT= ARGS=)
	@$(PY) train.py --preset finetune --init "$${INIT:-gpt2}" $(TRAIN_FLAGS)

doctor: setup ## measure for half a minute what limits training here, and say what to change (PRESET= ARGS=)
	@$(PY) train.py --explain $(TRAIN_FLAGS)

tune: setup ## find the fastest backends and launch rows on this GPU (PRESET= ARGS=)
	@$(PY) train.py --tune only $(TRAIN_FLAGS)

sample: setup ## continue a prompt with the newest model, or another (PROMPT= MODEL= ARGS=)
	@$(PY) -m model.generate $(MODEL_FLAG) --prompt "$$PROMPT" $(ARGS)

eval: setup-dev ## EleutherAI's harness on a model folder (MODEL=runs/NAME/model TASKS=hellaswag ARGS=)
	@: "$${MODEL:?must name a model folder, such as runs/smoke/model}"
	@$(PY) -c "import lm_eval" 2>/dev/null || $(PIP) "lm-eval[hf]==0.4.13"
	@$(PY) -m lm_eval --model hf --model_args "pretrained=$$MODEL" \
		--tasks "$${TASKS:-hellaswag}" $(ARGS)

demo: setup-dev ## try a model in the browser (MODEL= ARGS=)
	@$(PY) -m demo.app $(MODEL_FLAG) $(ARGS)

##@ test
test: setup-dev ## everything that can run on this machine (OP=layer_norm MACHINE=fp32 ARGS=)
	$(PYTEST) -m "not slow"

test-slow: setup-dev ## the longer sweeps
	$(PYTEST) -m slow

test-gpu: setup-dev ## the tests that need a GPU; fails without one
	$(PYTEST) -m gpu

##@ measure
bench: setup-dev ## time each op and the whole step against plain PyTorch (OP= ARGS=)
	$(PY) -m bench $(OP_FLAG) $(ARGS)

bench-step: setup-dev ## the training step alone; ARGS="--against nanogpt PATH" adds nanoGPT
	$(PY) -m bench.step $(ARGS)

profile: setup ## where the time of a step goes; writes runs/profile/trace.json (ARGS=)
	$(PY) -m bench.profile $(ARGS)

report: setup ## make docs/results.md, README's tables and the plots from bench/results/
	$(PY) -m bench.report $(ARGS)

##@ verify kernels and runs
numerics: setup-dev ## errors of our ops and of plain PyTorch against float64 (OP= ARGS=)
	$(PY) -m tests.numerics $(OP_FLAG) $(ARGS)

resources: setup-dev ## compile every kernel for every arch, no GPU needed (OP= ARGS=)
	env -u TRITON_INTERPRET $(PY) -m bench.resources $(OP_FLAG) $(ARGS)

torture: setup-dev ## kill runs 50 times, flip bytes, fill a disk: about ten minutes
	$(PY) -m tests.faults

matrix: setup ## run imports, builds and interpreter tests with other torch and triton versions (ARGS=)
	$(PY) -m tests.matrix $(ARGS)

mutants: setup-dev ## plant faults in the kernels, which the tests must notice (OP= ARGS=)
	$(PY) -m tests.mutants $(OP_FLAG) $(ARGS)

##@ edit
check: setup-dev ## run ruff and pyright; edits nothing
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

fix: setup-dev ## let ruff fix and format the code
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean: ## remove caches (keeps .venv and runs/)
	rm -rf .pytest_cache .ruff_cache .hypothesis .benchmarks .cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
