"""Reinforcement learning compared with TRL on one task, on the CPU:

    pip install trl==1.16.0      # and, for its last PPO, in an environment of its own:
                                 # trl==0.11.4 transformers==4.46.3 accelerate==1.1.1
                                 # peft==0.13.2 datasets==3.1.0 rich
    python bench/bench_trl.py --checkpoint=stories260K/ckpt.pt --data=data --out_dir=out/trl \\
        --rows=ours-ppo,ours-rloo,ours-grpo,trl-rloo:3e-5,trl-grpo:1e-5 --rollouts=12000

The task: the length reward, beta = 0.2, prompts of BOS and 0 to 29 tokens of a story, at most 300
new tokens, 200 rollouts per iteration. Both sides get the same prompts in the same order, as token
ids, and both results are measured with the same code: J, reward and exact KL on 6,144 held-out
prompts. TRL's policy is saved, and imported with export.py --hf.

A row is METHOD or METHOD:LEARNING_RATE. Each row runs in a process of its own with one thread. Its
time is the processor time (user and system) of the training iterations, without imports, J* and
measurements, because the clock means nothing on a shared machine. Its result is a JSON file in
--out_dir; a row that is complete is not run again (delete it if flags other than --rollouts
change), and a row of TRL with more --rollouts continues from its last checkpoint (trl-ppo starts
anew). The script prints a table and writes all measurements to trl.csv.

With --steps, it times optimizer steps instead: SFT with LoRA against transformers and peft, and DPO
against TRL's DPOTrainer, on the same batches. Each side is its own process; the two take turns.

    python bench/bench_trl.py --checkpoint=smollm2/ckpt.pt --steps=sft,dpo \\
        --instructions=instructions.json --preferences=preferences.json
"""

import argparse
import csv
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import parse_args, positive, run_main, write_atomic  # noqa: E402  (first: it reports missing packages)

# isort: split
import torch  # noqa: E402

import export  # noqa: E402
import train  # noqa: E402
from checkpoint import load_checkpoint, model_from_checkpoint  # noqa: E402
from instruct import Instructions, Rankings, find_template  # noqa: E402
from model import generate  # noqa: E402
from preferences import kl_to_reference  # noqa: E402
from rlhf import LengthReward  # noqa: E402
from tinystories import Prompts  # noqa: E402
from tokenizer import load_tokenizer, stop_ids  # noqa: E402

BETA, PER_ITERATION, MAX_NEW, START_LEN, GROUP = 0.2, 200, 300, 30, 4
ENOUGH = -0.85  # the J to which the time is measured
OURS = """--ppo --rollouts=200 --beta2=0.99 --weight_decay=0 --averaging=0.95 --device=cpu
    --init_kl_coef=0.2 --roof_prompts=1 --roof_samples=2 --report_rollouts=1""".split()
METHODS = {  # the flags of experiments/frontier.py
    "ours-ppo": "--batch_size=50 --learning_rate=3e-4 --value_learning_rate=1e-3 --freeze_layers=2",
    "ours-ppo-exact": "--batch_size=50 --learning_rate=3e-4 --value_learning_rate=1e-3"
    " --freeze_layers=2 --exact_end --lam=0.85",
    "ours-rloo": "--advantage=rloo --batch_size=100 --group_size=4 --learning_rate=5e-5",
    "ours-grpo": "--advantage=grpo --batch_size=100 --group_size=4 --learning_rate=3e-5",
    "trl-rloo": "3e-5",  # the best of those that were tried, see doc/ppo.md
    "trl-grpo": "1e-5",
    "trl-ppo": "1.41e-5",  # TRL's default
}

# ----------------------------------------------------------------------------
# measuring a model


class Meter:
    """Counts the processor time of training and measures the policy at some iterations."""

    def __init__(self, a, saved=(), peak=0):
        self.a, self.path, self.curve = a, Path(a.out_dir) / f"{a.row}.json", list(saved)
        self.reference = model_from_checkpoint(load_checkpoint(a.checkpoint))
        self.reference.requires_grad_(False)
        self.before = saved[-1]["seconds"] if saved else 0.0
        self.peak = peak  # MiB at the first measurement, to which measuring adds nothing

    def start(self):
        self.started = time.process_time()

    def seconds(self):
        return self.before + time.process_time() - self.started

    @torch.no_grad()
    def measure(self, iteration, model, n):
        """Appends J, reward and KL of `model`, on n held-out prompts, to the curve. The time that
        it takes does not count."""
        seconds = self.seconds()
        self.peak = self.peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        prompts = Prompts(self.a.data, "val", START_LEN, model.args.vocab_size).batch(0, n)
        uniform = torch.rand(n, MAX_NEW, generator=torch.Generator().manual_seed(1337))
        options = dict(stop_ids=stop_ids(None), uniform=uniform, max_batch=512)
        out = generate(model, prompts, MAX_NEW, **options)
        responses = out.responses()
        rewards = torch.tensor(LengthReward(200)(prompts, responses, out.ended)).double()
        kl = kl_to_reference(model, self.reference, prompts, responses, 50)[0].double()
        j = rewards - BETA * kl
        self.curve.append(
            dict(
                rollouts=iteration * PER_ITERATION,
                seconds=round(seconds, 2),
                prompts=n,
                objective=float(j.mean()),
                error=float(j.std()) / n**0.5,
                reward=float(rewards.mean()),
                kl=float(kl.mean()),
                length=float(
                    torch.tensor([len(q + r) for q, r in zip(prompts, responses)]).mean(
                        dtype=torch.float
                    )
                ),
                ended=float(out.ended.float().mean()),
            )
        )
        self.write()
        print(json.dumps(self.curve[-1]), flush=True)
        self.before, self.started = seconds, time.process_time()

    def write(self):
        with write_atomic(self.path, "w") as f:
            named = {"row": self.a.row, "our_flags": self.a.our_flags}
            json.dump(named | {"peak_mib": round(self.peak), "curve": self.curve}, f)


def train_prompts(a, first, n, group):
    """The prompts of the rollouts `first` to `first + n`; a group has the same prompt."""
    return Prompts(a.data, "train", START_LEN, 512).batch(first // group, n // group)


# ----------------------------------------------------------------------------
# ours


def run_ours(a, method, rate):
    iterations = a.rollouts // PER_ITERATION
    with tempfile.TemporaryDirectory() as folder:
        flags = [*OURS, *METHODS[method].split(), f"--ppo_iters={iterations}"]
        flags += [f"--init_from={a.checkpoint}", f"--data={a.data}", f"--out_dir={folder}"]
        flags += [*([f"--learning_rate={rate}"] if rate else []), *a.our_flags.split()]
        with redirect_stdout(StringIO()):
            stage = train.start(train.setup(train.flags(flags)))
        result = model_from_checkpoint(load_checkpoint(a.checkpoint)).requires_grad_(False)
        meter, first = Meter(a), stage.run.start_iteration
        meter.start()
        for i in range(iterations):
            stage.step(first + i)
            if due := prompts_to_measure(a, i + 1, iterations):
                result.load_state_dict(stage.result())
                meter.measure(i + 1, result, due)


def prompts_to_measure(a, iteration, last):
    """The number of held-out prompts after this iteration; 0 means none."""
    if iteration == last:
        return a.report_rollouts
    return a.curve_rollouts if iteration % a.measure_every == 0 else 0


# ----------------------------------------------------------------------------
# TRL


def run_trl(a, method, rate):
    import datasets
    import transformers
    import trl

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    grpo = method == "trl-grpo"
    Config, Trainer = (
        (trl.GRPOConfig, trl.GRPOTrainer) if grpo else (trl.RLOOConfig, trl.RLOOTrainer)
    )
    work, iterations = Path(a.out_dir) / a.row, a.rollouts // PER_ITERATION
    hf = Path(a.out_dir) / "hf"
    saved, peak, last = [], 0, None
    if work.exists() and (path := Path(a.out_dir) / f"{a.row}.json").exists():
        found = json.loads(path.read_text())
        saved, peak = found["curve"], found["peak_mib"]
        last = transformers.trainer_utils.get_last_checkpoint(str(work))
    steps = PER_ITERATION // a.trl_batch  # optimizer steps per iteration
    config = Config(
        output_dir=str(work),
        learning_rate=float(rate),
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=10,
        per_device_train_batch_size=a.trl_batch,
        steps_per_generation=steps,
        num_generations=GROUP,
        max_completion_length=MAX_NEW,
        beta=BETA,
        adam_beta2=0.99,
        max_grad_norm=1.0,
        max_steps=steps * iterations,
        shuffle_dataset=False,
        save_steps=steps * a.measure_every,
        save_total_limit=1,
        logging_steps=steps,
        disable_tqdm=True,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        seed=1,
    )
    # Stories end with BOS, so it is the token that ends a completion.
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf, padding_side="left")
    tokenizer.eos_token, tokenizer.pad_token = "<s>", "<unk>"
    model = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    model.generation_config.eos_token_id = list(stop_ids(None))

    class SameIds(Trainer):
        """Prompts are token ids, written as text; a decoded prompt would get other ids."""

        def _tokenize_prompts(self, prompts):
            return [[int(i) for i in p.split()] for p in prompts], None, {}

    def reward(prompts, completion_ids, **others):
        return [-abs(200 - len(p.split()) - len(c)) / 100 for p, c in zip(prompts, completion_ids)]

    class Measure(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model, **others):
            iteration, rest = divmod(state.global_step, steps)
            due = not rest and prompts_to_measure(a, iteration, iterations)
            if due:
                meter.measure(iteration, imported(model, tokenizer), due)

    prompts = [" ".join(map(str, p)) for p in train_prompts(a, 0, a.rollouts, GROUP)]
    data = datasets.Dataset.from_dict({"prompt": prompts})
    trainer = SameIds(
        model, reward, config, data, processing_class=tokenizer, callbacks=[Measure()]
    )
    # A run that was interrupted after a measurement and before its checkpoint repeats iterations.
    done = int(last.rpartition("-")[2]) // steps * PER_ITERATION if last else 0
    meter = Meter(a, [x for x in saved if x["rollouts"] <= done], peak)
    meter.start()
    trainer.train(resume_from_checkpoint=last)


def run_trl_ppo(a, method, rate):
    """TRL's last PPO, that of 0.11.4, with the defaults of its PPOConfig and a constant β."""
    import transformers
    import trl

    hf, iterations = Path(a.out_dir) / "hf", a.rollouts // PER_ITERATION
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf, padding_side="left")
    tokenizer.eos_token, tokenizer.pad_token = "<s>", "<unk>"
    torch.manual_seed(1)
    load = trl.AutoModelForCausalLMWithValueHead.from_pretrained
    config = trl.PPOConfig(
        learning_rate=float(rate),
        init_kl_coef=BETA,
        adap_kl_ctrl=False,
        batch_size=PER_ITERATION,
        mini_batch_size=a.trl_batch,
        accelerator_kwargs={"cpu": True},
    )
    trainer = trl.PPOTrainer(config, load(str(hf)), load(str(hf)), tokenizer)
    options = dict(max_new_tokens=MAX_NEW, do_sample=True, top_k=0, top_p=1.0)
    options |= dict(eos_token_id=list(stop_ids(None)), pad_token_id=tokenizer.pad_token_id)
    meter = Meter(a)
    meter.start()
    for i in range(iterations):
        prompts = train_prompts(a, i * PER_ITERATION, PER_ITERATION, 1)
        queries = [torch.tensor(p) for p in prompts]
        out = trainer.generate(queries, batch_size=PER_ITERATION, return_prompt=False, **options)
        rewards = [torch.tensor(-abs(200 - len(q) - len(r)) / 100) for q, r in zip(queries, out)]
        stats = trainer.step(queries, out, rewards)
        print(i, stats["objective/kl"], float(sum(rewards)) / len(rewards), flush=True)
        if due := prompts_to_measure(a, i + 1, iterations):
            meter.measure(i + 1, imported(trainer.model.pretrained_model, tokenizer), due)


def imported(model, tokenizer):
    """A transformers model as one of ours, by the files that save_pretrained and export.py --hf
    write."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        model.save_pretrained(f"{folder}/hf")
        tokenizer.save_pretrained(f"{folder}/hf")
        export.main([f"{folder}/ckpt.pt", f"--hf={folder}/hf"])
        return model_from_checkpoint(load_checkpoint(f"{folder}/ckpt.pt")).requires_grad_(False)


# ----------------------------------------------------------------------------
# optimizer steps


def step_flags(a, task):
    """The flags of train.py for the steps of a task, "sft" or "dpo"."""
    flags = [f"--{task}", f"--init_from={a.checkpoint}", f"--data={a.data_of[task]}"]
    flags += [f"--batch_size={a.step_batch}", f"--out_dir={a.out_dir}/{task}", "--device=cpu"]
    flags += ["--max_iters=1000", "--learning_rate=1e-4", "--warmup_iters=0", "--eval_iters=1"]
    lora = ["--lora_rank=8", "--lora_alpha=16", "--lora_layers=q,v"]
    return flags + (lora if task == "sft" else [])


def write_batches(a, task):
    """Writes the batches that `ours` reads, for the other side; returns their mean numbers of
    tokens, and of tokens with padding."""
    args = train.flags(step_flags(a, task))
    checkpoint = load_checkpoint(a.checkpoint, mmap=True)
    size, context = (checkpoint["model_args"][k] for k in ("vocab_size", "max_seq_len"))
    tokenizer, _, _ = load_tokenizer(args, checkpoint, [], size)
    template = find_template("", checkpoint, tokenizer, "plain")
    kind = Instructions if task == "sft" else Rankings
    samples = kind(args.data, "train", tokenizer, template, context, args.seed)
    n, batches = a.step_batch, []
    for i in range(a.repeat + 1):
        batch = samples.batch(i * n, n)
        if task == "sft":
            batch = [
                {"input_ids": ids, "labels": [x if m else -100 for x, m in zip(ids, mask)]}
                for ids, mask in batch
            ]
            lengths = [len(row["input_ids"]) for row in batch]
        else:
            batch = [
                {"prompt_ids": q, "chosen_ids": completions[0], "rejected_ids": completions[-1]}
                for q, completions in batch
            ]
            names = "chosen_ids", "rejected_ids"
            lengths = [len(row["prompt_ids"]) + len(row[k]) for row in batch for k in names]
        batches.append(batch)
        print(f"{task} batch {i}: {sum(lengths)} tokens, {len(lengths) * max(lengths)} padded")
    with write_atomic(Path(a.out_dir) / f"{task}.json", "w") as f:
        json.dump(batches, f)


def our_steps(a, task):
    """A function (i) -> the loss of optimizer step i."""
    with redirect_stdout(StringIO()):
        stage = train.start(train.setup(train.flags(step_flags(a, task))))
    return lambda i: stage.step(i)["loss/train"]


def their_steps(a, task):
    """The same with transformers and peft (SFT) or TRL (DPO)."""
    import datasets
    import peft
    import transformers
    import trl
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    batches = json.loads((Path(a.out_dir) / f"{task}.json").read_text())
    hf = Path(a.out_dir) / "hf"

    def load():
        return transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)

    def update(model, optimizer):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    if task == "sft":
        lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
        model = peft.get_peft_model(load(), lora).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, 1e-4)
        collate = DataCollatorForLanguageModeling(pad_token_id=0)

        def step(i):
            loss = model(**collate(batches[i])).loss
            loss.backward()
            update(model, optimizer)
            return loss.item()

        return step
    config = trl.DPOConfig(
        output_dir=f"{a.out_dir}/dpo-trl",
        beta=0.1,
        learning_rate=1e-4,
        use_cpu=True,
        bf16=False,
        report_to=[],
        gradient_checkpointing=False,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf)
    text = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    models = load(), load().requires_grad_(False)
    trainer = trl.DPOTrainer(*models, config, train_dataset=text, processing_class=tokenizer)
    trainer.model.train()
    optimizer = trainer.create_optimizer()

    def step(i):
        trainer.current_gradient_accumulation_steps = 1
        loss = trainer.training_step(trainer.model, trainer.data_collator(batches[i]))
        update(trainer.model, optimizer)
        return loss.item()

    return step


def worker(a):
    """Reads the number of a step from stdin, takes the step, and prints its processor time."""
    side, task = a.worker.split(":")
    torch.manual_seed(0)
    out = os.fdopen(os.dup(1), "w")  # stdout is for the answers alone
    os.dup2(2, 1)
    step = (our_steps if side == "ours" else their_steps)(a, task)
    for line in sys.stdin:
        t = time.process_time()
        loss = step(int(line))
        seconds = time.process_time() - t
        mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps([seconds, loss, mib]), file=out, flush=True)


def steps_side_by_side(a, task):
    """Lets both sides take the same steps in turn; prints the times, without the first step's."""
    write_batches(a, task)
    flags = child_flags(a)
    log = open(Path(a.out_dir) / f"{task}-steps.txt", "a")
    sides = {}
    for side in ("ours", "theirs"):
        command = [sys.executable, __file__, *flags, f"--worker={side}:{task}"]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        sides[side] = subprocess.Popen(command, env=ENVIRONMENT, **pipes)
    found = {side: [] for side in sides}
    for i in range(a.repeat + 1):
        for side, process in sides.items():
            process.stdin.write(f"{i}\n")
            process.stdin.flush()
            if not (line := process.stdout.readline()):
                raise ValueError(f"{side} failed, {log.name} says why")
            found[side].append(json.loads(line))
    for process in sides.values():
        process.stdin.close()
        process.wait()
    times = {side: sorted(t for t, _, _ in xs[1:]) for side, xs in found.items()}
    middle = {side: ts[len(ts) // 2] for side, ts in times.items()}
    for side, xs in found.items():
        losses = " ".join(f"{loss:.4f}" for _, loss, _ in xs)
        print(
            f"{task:4}{side:7}{middle[side]:7.2f} s per step (median of {a.repeat}, "
            f"{times[side][0]:.2f} to {times[side][-1]:.2f}) | {xs[-1][2]:,.0f} MiB | loss {losses}"
        )
    print(f"{task:4}ratio {middle['theirs'] / middle['ours']:.2f}", flush=True)


# ----------------------------------------------------------------------------
# the table

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def child_flags(a):
    names = set(vars(a)) - {"rows", "row", "worker", "steps", "given", "data_of"}
    return [f"--{name}={getattr(a, name)}" for name in sorted(names)]


def run_row(a, row):
    """Runs a row in a process of its own, unless it is complete. Returns its JSON."""
    path = Path(a.out_dir) / f"{row}.json"

    def complete():
        found = json.loads(path.read_text())
        same = row.startswith("trl") or found["our_flags"] == a.our_flags
        return same and found["curve"] and found["curve"][-1]["rollouts"] >= a.rollouts

    if not (path.exists() and complete()):
        python = a.trl_ppo_python if row.startswith("trl-ppo") else sys.executable
        command = [python, __file__, *child_flags(a), f"--row={row}"]
        with open(f"{path.with_suffix('')}.txt", "a") as log:
            if subprocess.run(command, stdout=log, stderr=log, env=ENVIRONMENT).returncode:
                raise ValueError(f"the row {row} failed, {log.name} says why")
    return json.loads(path.read_text())


def print_row(found):
    """Prints the last measurement of a row, and when J first was at least ENOUGH."""
    curve, last = found["curve"], found["curve"][-1]
    reached = next((f"{x['seconds']:.0f} s" for x in curve if x["objective"] >= ENOUGH), "never")
    print(
        f"{found['row']:<18}{last['rollouts']:7,} rollouts | J {last['objective']:.3f} "
        f"± {last['error']:.3f} | reward {last['reward']:.3f} | KL {last['kl']:.2f} | "
        f"{last['seconds'] / last['rollouts'] * PER_ITERATION:.2f} s/iteration | "
        f"J >= {ENOUGH} after: {reached} | {found['peak_mib']:,} MiB",
        flush=True,
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default="stories260K/ckpt.pt")
    parser.add_argument("--data", default="data", help="folder with the pretokenized stories")
    parser.add_argument("--out_dir", default="out/trl", help="folder for the results")
    parser.add_argument("--rows", default=",".join(METHODS), help="METHOD or METHOD:LEARNING_RATE")
    parser.add_argument("--rollouts", type=positive, default=12000, help="rollouts per row")
    parser.add_argument("--measure_every", type=int, default=10, help="iterations per measurement")
    parser.add_argument("--curve_rollouts", type=int, default=1024, help="held-out prompts for it")
    parser.add_argument("--report_rollouts", type=positive, default=6144, help="those at the end")
    parser.add_argument(
        "--trl_ppo_python",
        default="",
        help="python of an environment with trl==0.11.4, for trl-ppo (left out without it)",
    )
    parser.add_argument("--our_flags", default="", help="further flags of train.py for our rows")
    parser.add_argument("--trl_batch", type=positive, default=50, help="rollouts per step of TRL")
    parser.add_argument("--steps", default="", help="sft, dpo, or both: time optimizer steps")
    parser.add_argument("--instructions", default="instructions.json", help="the data for sft")
    parser.add_argument("--preferences", default="preferences.json", help="the data for dpo")
    parser.add_argument("--step_batch", type=positive, default=4, help="samples or pairs per step")
    parser.add_argument("--repeat", type=positive, default=5, help="timed steps")
    parser.add_argument("--row", default="", help=argparse.SUPPRESS)
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    a = parse_args(parser, argv)
    a.data_of = {"sft": a.instructions, "dpo": a.preferences}
    if a.rollouts < PER_ITERATION or a.rollouts % PER_ITERATION:
        raise ValueError(f"--rollouts must be a multiple of {PER_ITERATION}, not {a.rollouts}")
    Path(a.out_dir).mkdir(parents=True, exist_ok=True)
    hf = Path(a.out_dir) / "hf"
    if not hf.exists():
        export.main([str(hf), f"--checkpoint={a.checkpoint}", "--format=hf"])
    if a.row:
        torch.set_num_threads(1)
        method, _, rate = a.row.partition(":")
        if method == "trl-ppo":
            return run_trl_ppo(a, method, rate)
        return (run_trl if method.startswith("trl") else run_ours)(a, method, rate)
    if a.worker:
        torch.set_num_threads(1)
        return worker(a)
    if a.steps:
        for task in a.steps.split(","):
            if task not in a.data_of:
                raise ValueError(f"--steps: {task} is not sft or dpo")
            steps_side_by_side(a, task)
        return None
    rows = []
    for row in a.rows.split(","):
        method, _, rate = row.partition(":")
        if method not in METHODS:
            raise ValueError(f"--rows: {method} is not one of {', '.join(METHODS)}")
        if method == "trl-ppo" and not a.trl_ppo_python:
            print("trl-ppo is left out: --trl_ppo_python names an environment with trl==0.11.4")
            continue
        if method in ("trl-rloo", "trl-grpo") and not importlib.util.find_spec("trl"):
            raise ValueError(f"{method} needs: pip install trl==1.16.0")
        if method.startswith("trl") and not rate:
            row += f":{METHODS[method]}"
        found = run_row(a, row)
        print_row(found)
        rest = {k: found[k] for k in ("row", "our_flags", "peak_mib")}
        rows += [rest | measured for measured in found["curve"]]
    with write_atomic(Path(a.out_dir) / "trl.csv", "w") as f:
        writer = csv.DictWriter(f, list(rows[0]) if rows else ["row"])
        writer.writeheader()
        for r in rows:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in r.items()})


if __name__ == "__main__":
    run_main(main)
