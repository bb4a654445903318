"""
The command line: each stage of train.py and each sub-command shows its own flags, refuses those of
the others, and uses every flag that it shows.
"""

import ast
import copy
import json
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from test_commands import PPO as PUBLISHED_PPO
from test_commands import PPO_CPU, PRETRAIN

import instruct
import pretraining
import tinystories
import train
from checkpoint import checkpoint_args, load_checkpoint, save_checkpoint
from common import flag_names, run_main
from model import ModelArgs, Transformer

ROOT = Path(train.__file__).parent
VOCAB = 320

# Command lines that together show every flag of a stage.
SHOWING = {
    "pretraining": ["", "--optimizer=muon --wandb_log --plan"],
    "--sft": ["--sft", "--sft --optimizer=muon --wandb_log --lora_rank=1 --plan"],
    "--rm": ["--rm", "--rm --optimizer=muon --wandb_log --plan"],
    "--dpo": ["--dpo", "--dpo --optimizer=muon --wandb_log --plan"],
    "--ppo": [
        "--ppo",
        "--ppo --wandb_log --lora_rank=1 --adap_kl_ctrl --kl_in=reward --reward=x.pt --ptx_coef=1 "
        "--data=x.json",
        "--ppo --value_model=shared --plan",
    ],
}
SWITCHES = {"sft", "rm", "dpo", "ppo"}
# Flags of the published PPO commands, which --ppo accepts, and a flag without effect in all stages.
PUBLISHED = {n.lstrip("-").partition("=")[0] for n in shlex.split(PUBLISHED_PPO)[2:]}
ALWAYS = {"always_save_checkpoint"}


def help_of(capsys, line, main=train.main):
    with pytest.raises(SystemExit) as e:
        main(shlex.split(f"{line} --help"))
    assert e.value.code == 0
    return capsys.readouterr().out


def names(text):
    """The flags that a help text describes."""
    return re.findall(r"^  --(\w+)", text, re.M)


def error_of(capsys, line, main=train.main):
    """The exit status of a command that fails, and its one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        run_main(lambda: main(shlex.split(line)))
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1, text
    return e.value.code, text


def all_flags(capsys):
    """{stage: the flags that it shows}"""
    return {
        stage: {n for line in lines for n in names(help_of(capsys, line))}
        for stage, lines in SHOWING.items()
    }


@pytest.mark.parametrize("stage", SHOWING)
def test_help_is_short_and_complete(capsys, stage):
    """At most 46 flags, 72 for a stage, including -h; each shows its default."""
    line = SHOWING[stage][0]
    text = help_of(capsys, line)
    assert len(names(text)) + 1 <= (72 if line else 46)
    assert help_of(capsys, line.partition(" ")[2] + " -h " + line.partition(" ")[0]) == text
    defaults = vars(train.flags(shlex.split(line)))
    for line in SHOWING[stage]:
        text = help_of(capsys, line)
        entries = [" ".join(e.split()) for e in text.split("\n  --")[1:]]
        assert len(entries) == len(names(text)) == len(set(names(text)))
        for name, entry in zip(names(text), entries):
            default = defaults[name]
            given = re.search(rf"--{name}\b", line) or name == "wandb_run_name"
            shown = given or default in (None, "") or f"(default: {default})" in entry
            assert shown, entry
            assert len(re.sub(r"\(default.*", "", entry).split()) > 2, entry


def test_every_field_is_a_flag_that_some_help_shows(capsys):
    shown = set().union(*all_flags(capsys).values())
    assert shown == vars(train.flags([])).keys() - ALWAYS - {"given"}
    assert PUBLISHED <= shown | ALWAYS


@pytest.mark.parametrize("stage", SHOWING)
def test_flag_of_another_stage_is_refused(capsys, stage):
    """Each of them, with the stages that have it; a flag of the published commands is accepted."""
    flags, line = all_flags(capsys), SHOWING[stage][0]
    everything = set().union(*flags.values()) | ALWAYS
    defaults = train.flags([])
    accepted = (PUBLISHED if stage == "--ppo" else set()) | ALWAYS | {"plot"} | SWITCHES
    refused = sorted(everything - flags[stage] - accepted)
    assert len(refused) > 8
    for name in refused:
        value = getattr(defaults, name)
        status, text = error_of(capsys, f"{line} --{name}={value or 1}")
        owners = [s for s in SHOWING if name in flags[s]]
        assert status == 2 and text.startswith(f"error: --{name} is a flag of "), text
        assert set(re.findall(r"--\w+|pretraining", text.partition("of ")[2])) - {"--help"} == set(
            owners
        )
    for name in sorted((flags[stage] | accepted) - SWITCHES):
        if name in flags["pretraining"] | accepted:
            value = getattr(defaults, name)
            context = " ".join(SHOWING[stage][1:2]) or line
            if name == "start_len":  # which has no effect with --data=FILE
                context = "--ppo"
            if value not in (None, ""):
                train.flags(shlex.split(f"{context} --{name}={value}"))


def test_reported_commands(capsys):
    assert error_of(capsys, "--lora_rank=8 --advantage=foo --reward=/no/such.py:f") == (
        2,
        "error: --lora_rank is a flag of --sft and --ppo (see train.py --help)\n",
    )
    assert error_of(capsys, "--ppo --optimizer=muon")[1].startswith(
        "error: --optimizer is a flag of pretraining, --sft, --rm and --dpo"
    )
    assert error_of(capsys, "--sft --rm")[1] == "error: one stage at a time, not --sft and --rm\n"
    assert train.flags(["--ppo", "--sft=False"]).ppo
    args = train.flags(["--data_dir=x"])
    assert args.data == "x" and args.given == ["data"]


@pytest.mark.parametrize(
    "line, name, why",
    [
        ("--muon_learning_rate=1", "muon_learning_rate", "without --optimizer=muon"),
        ("--decay_lr=False --schedule=linear", "schedule", "with --decay_lr=False"),
        ("--decay_lr=False --warmup_iters=5", "warmup_iters", "with --decay_lr=False"),
        ("--wandb_project=x", "wandb_project", "without --wandb_log"),
        ("--plan_gpu=cpu", "plan_gpu", "without --plan"),
        ("--plan_mfu=0.5", "plan_mfu", "without --plan"),
        ("--sft --lora_4bit", "lora_4bit", "without --lora_rank"),
        ("--sft --lora_dropout=0.1", "lora_dropout", "without --lora_rank"),
        ("--sft --lora_layers=q", "lora_layers", "without --lora_rank"),
        ("--ppo --lora_alpha=1", "lora_alpha", "without --lora_rank"),
        ("--ppo --reward=x.py:f --target_len=9", "target_len", "without --reward=length"),
        ("--ppo --reward_device=cpu", "reward_device", "without a reward model"),
        ("--ppo --ptx_data=x", "ptx_data", "without --ptx_coef"),
        ("--ppo --val_data=x.json", "val_data", "without --data=FILE"),
        ("--ppo --template=plain", "template", "without --data=FILE"),
        ("--ppo --data=x.jsonl --start_len=9", "start_len", "with --data=FILE"),
        ("--ppo --horizon=9", "horizon", "without --adap_kl_ctrl"),
        ("--ppo --target=9", "target", "without --adap_kl_ctrl"),
        ("--ppo --whiten_rewards", "whiten_rewards", "without --kl_in=reward"),
        ("--ppo --vf_coef=1", "vf_coef", "without --value_model=shared"),
        (
            "--ppo --value_model=shared --value_learning_rate=1",
            "value_learning_rate",
            "with --value_model",
        ),
        ("--ppo --value_model=shared --critic_warmup=1", "critic_warmup", "with --value_model"),
        ("--ppo --advantage=reinforce --lam=1", "lam", "without --advantage=gae"),
        (
            "--ppo --advantage=rloo --value_learning_rate=1",
            "value_learning_rate",
            "without --advantage=gae",
        ),
        ("--ppo --advantage=rloo --group_size=2 --gamma=1", "gamma", "with --advantage=rloo"),
    ],
)
def test_flag_without_effect_is_refused(capsys, line, name, why):
    status, text = error_of(capsys, line)
    assert status == 2 and text.startswith(f"error: --{name} has no effect {why}"), text
    stage = " ".join(w for w in line.split() if f"--{name}" not in w)
    assert name not in names(help_of(capsys, stage))


def test_documented_commands_parse(capsys):
    """The published commands, and those of README, doc/ and Makefile."""
    files = ROOT / "README.md", *sorted((ROOT / "doc").glob("*.md"))
    text = "\n".join(f.read_text() for f in files).replace("\\\n", " ")
    lines = re.findall(r"^(?:torchrun [^#\n]*|python )(train.py[^#\n]*)", text, re.M)
    assert len(lines) > 8
    assert not any("$" in line for line in lines)  # zsh does not split a variable into words
    if shutil.which("make"):
        made = subprocess.run(
            ["make", "-n", "-B", "rlhf", "demo"], cwd=ROOT, capture_output=True, text=True
        )
        found = re.findall(r"^\S+ (train.py .*)", made.stdout.replace("\\\n", " "), re.M)
        assert made.returncode == 0 and len(found) > 5
        lines += found
    lines += [line.partition("python ")[2] for line in (PRETRAIN, PUBLISHED_PPO, PPO_CPU)]
    for line in lines:
        train.flags([w for w in shlex.split(line)[1:] if w != "..."])
    assert train.flags(shlex.split(PUBLISHED_PPO)[2:]).dim == 64


@pytest.mark.parametrize("module", [tinystories, instruct])
def test_sub_commands(capsys, module):
    """Each shows and takes its own flags; a flag of another is an error that says whose it is."""
    own = {c: names(help_of(capsys, c, module.main)) for c in module.COMMANDS}
    for command in own:
        assert own[command] == [n for n in names_in_order(module) if n in module.COMMANDS[command]]
        for name in {n for flags in own.values() for n in flags} - set(own[command]):
            status, text = error_of(capsys, f"{command} --{name}=1", module.main)
            owners = [c for c in own if name in own[c]]
            assert status == 2 and text.startswith(f"error: --{name} is a flag of "), text
            assert set(re.findall(r"\w+", text.partition("flag of ")[2].partition("(")[0])) - {
                "and"
            } == set(owners)
    assert all(c in help_of(capsys, "", module.main) for c in own)
    assert error_of(capsys, "", module.main)[0] == 2


def names_in_order(module):
    source = Path(module.__file__).read_text().rpartition("def main(")[2]
    return re.findall(r'"--(\w+)"', source)


# ----------------------------------------------------------------------------
# every flag that a stage shows has an effect: it changes the run, or the run refuses the value


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with stories, a vocabulary, a model with random weights, and instructions."""
    folder = tmp_path_factory.mktemp("home")
    tinystories.synthesize(folder, 60, 1)
    tinystories.train_vocab(folder, VOCAB)
    tinystories.pretokenize(folder, VOCAB)
    torch.manual_seed(1)
    args = dict(dim=16, n_layers=2, n_heads=2, n_kv_heads=1, multiple_of=8, max_seq_len=64)
    net = Transformer(ModelArgs(vocab_size=VOCAB, **args))
    parts = {"model": net.state_dict(), "model_args": checkpoint_args(net.args), "iter_num": 7}
    save_checkpoint(folder / "ckpt.pt", parts)
    with torch.no_grad():
        net.output.weight.add_(0.01)
    save_checkpoint(folder / "other.pt", parts)
    for name, n in (("a", 40), ("b", 50)):
        rows = [{"prompt": f"say {i}", "response": f"{name} {i * i}"} for i in range(n)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = [
        {"prompt": f"say {i}", "chosen": f"a {i}", "rejected": f"b {i} {i}"} for i in range(40)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (folder / "reward.py").write_text(
        "def f(prompts, responses):\n    return [len(r) for r in responses]\n"
    )
    return folder


COMMON = dict(device="cpu", batch_size=4, eval_interval=2, learning_rate=1e-2)
BASE = {
    "--sft": dict(sft=True, max_iters=5, eval_iters=2, warmup_iters=2, **COMMON),
    "--ppo": dict(
        ppo=True,
        max_iters=3,
        rollouts=8,
        max_gen_len=8,
        start_len=6,
        target_len=10,
        roof_prompts=2,
        roof_samples=2,
        report_rollouts=4,
        ppo_warmup_steps=1,
        **COMMON,
    ),
}
# Another value of each flag, and flags with which it has an effect; {} is the folder `home`, None a
# flag of BASE that is left out.
EFFECTS = {
    "init_from": ("{}/other.pt", {}),
    "eval_interval": (1, {}),
    "eval_only": (True, {}),
    "log_interval": (2, {}),
    "tensorboard": (True, {}),
    "wandb_log": (True, {}),
    "wandb_project": ("x", {"wandb_log": True}),
    "wandb_run_name": ("x", {"wandb_log": True}),
    "tokenizer": ("none.model", {}),
    "batch_size": (8, {}),
    "learning_rate": (1e-3, {}),
    "gradient_accumulation_steps": (2, {}),
    "max_iters": (2, {}),
    "weight_decay": (0, {}),
    "beta1": (0.5, {}),
    "beta2": (0.5, {}),
    "adam_eps": (1e-2, {}),
    "grad_clip": (1e-3, {"adam_eps": 1}),
    "decay_lr": (False, {}),
    "schedule": ("linear", {"warmup_iters": 0}),
    "device": ("tpu", {}),
    "dtype": ("bfloat16", {}),
    "seed": (1, {}),
}
INSTRUCTIONS = {
    "val_data": ("{}/b.jsonl", {"data": "{}/a.jsonl", "start_len": None}),
    "template": ("llama2", {"data": "{}/a.jsonl", "start_len": None}),
    "lora_rank": (2, {}),
    "lora_alpha": (99, {"lora_rank": 2}),
    "lora_layers": ("o", {"lora_rank": 2}),
}
SFT_EFFECTS = (
    EFFECTS
    | INSTRUCTIONS
    | {
        "data": ("{}/b.jsonl", {}),
        "eval_iters": (1, {}),
        "dropout": (0.5, {}),
        "optimizer": ("muon", {}),
        "muon_learning_rate": (1, {"optimizer": "muon"}),
        "warmup_iters": (1, {}),
        "freeze_layers": (1, {}),
        "fsdp": (True, {}),
        "lora_dropout": (0.5, {"lora_rank": 2}),
        "lora_4bit": (True, {"lora_rank": 2}),
    }
)
CLIPPED = {"ppo_epochs": 3, "learning_rate": 0.1, "target_kl": 99}
PPO_EFFECTS = (
    EFFECTS
    | INSTRUCTIONS
    | {
        "max_iters": (2, {}),
        "data": ("{}/a.jsonl", {}),
        "ppo_iters": (1, {}),
        "reward": ("{}/reward.py:f", {}),
        "target_len": (5, {}),
        "reward_device": ("tpu", {"reward": "x.pt"}),
        "ref_device": ("tpu", {}),
        "start_len": (2, {}),
        "value_learning_rate": (1e-3, {}),
        "ppo_warmup_steps": (5, {}),
        "ptx_data": ("{}/a.jsonl", {"ptx_coef": 0.1}),
        "roof_prompts": (1, {}),
        "roof_samples": (3, {}),
        "report_rollouts": (3, {}),
        "ppo_debug": (True, {}),
        "init_kl_coef": (0.5, {}),
        "kl_penalty": ("kl", {}),
        "kl_in": ("loss", {}),
        "adap_kl_ctrl": (True, {"horizon": 8}),
        "target": (0.01, {"adap_kl_ctrl": True, "horizon": 8}),
        "horizon": (8, {"adap_kl_ctrl": True}),
        "rollouts": (12, {}),
        "max_gen_len": (6, {}),
        "temperature": (0.5, {}),
        "missing_eos_penalty": (1, {}),
        "exact_end": (True, {}),
        "advantage": ("reinforce", {}),
        "group_size": (2, {}),
        "gamma": (0.5, {}),
        "lam": (0.1, {}),
        "lam_value": (0.1, {}),
        "whiten_rewards": (True, {"kl_in": "reward", "kl_penalty": "kl"}),
        "whiten_advantages": (False, {}),
        "reward_clip": (0.001, {}),
        "reward_scale": (True, {}),
        "ppo_epochs": (2, {}),
        "cliprange": (0.01, CLIPPED),
        "cliprange_high": (0.01, CLIPPED),
        "loss_aggregation": ("sequence", {"advantage": "reinforce", "max_gen_len": 30}),
        "entropy_coef": (0.1, {}),
        "target_kl": (1e-6, CLIPPED),
        "ptx_coef": (0.1, {}),
        "value_model": ("shared", {}),
        "vf_coef": (2, {"value_model": "shared"}),
        "critic_warmup": (1, {}),
        "averaging": (0.5, {}),
        "freeze_layers": (1, {}),
        "fsdp": (True, {}),
    }
)
# Every run has out_dir and the stage itself. test_align.py tests offload and
# checkpoint_activations, which change memory alone; compile is slow on a CPU and tested in
# test_train.py.
# test_report.py tests the plan and the pictures.
TOOLS = {"plot", "plan", "plan_model", "plan_len"}
ELSEWHERE = {
    "--sft": {"out_dir", "sft", "compile", "checkpoint_activations"} | TOOLS,
    "--ppo": {"out_dir", "ppo", "compile", "offload", "checkpoint_activations"} | TOOLS,
}


def main_without_writes(argv, monkeypatch):
    """train.main, which must leave the parsed flags as they are."""
    parsed = []

    def flags(argv):
        parsed.append(parse(argv))
        copies.append(copy.deepcopy(vars(parsed[-1])))
        return parsed[-1]

    copies, parse = [], train.flags
    with monkeypatch.context() as m:
        m.setattr(train, "flags", flags)
        try:
            train.main(argv)
        finally:
            assert [vars(args) for args in parsed] == copies, "a run writes to its flags"


@pytest.mark.parametrize("stage", ["", "--rm", "--dpo"])
def test_flags_are_not_written_to(home, tmp_path, monkeypatch, stage):
    """(The runs of test_every_flag_changes_something check SFT and PPO.)"""
    monkeypatch.setattr(pretraining, "peak_matmul_flops", lambda *_: 1e12)
    data = home / "pairs.jsonl" if stage else home
    flags = f"--data={data} --out_dir={tmp_path} --device=cpu --batch_size=2"
    flags += " --max_iters=1 --eval_iters=1"
    if stage:
        flags += f" {stage} --init_from={home}/ckpt.pt --tokenizer={home}/tok{VOCAB}.model"
        flags += " --max_gen_len=4 --reference_samples=2"
    else:
        flags += f" --vocab_source=custom --vocab_size={VOCAB} --dim=16 --n_layers=1 --n_heads=2"
        flags += " --max_seq_len=32"
    main_without_writes(shlex.split(flags), monkeypatch)


def test_the_loop_knows_no_stage():
    """From save() on, train.py has no flag, no name and no class of a stage."""
    kinds = {"pretraining": train.Pretraining, **train.STAGES}
    tools = set(flag_names(pretraining.ToolFlags))  # --plot and --plan, which do not train
    own = {n for kind in kinds.values() for group in kind.flags for n in flag_names(group)}
    own = (own | kinds.keys()) - tools
    assert {"ppo_debug", "eval_iters", "dim", "dpo_beta", "rm"} < own
    # The model's shape and the template are decided before there is a stage: checkpoints have both.
    own -= {"template", *train.MODEL_FLAGS}
    classes = {kind.__name__ for kind in kinds.values()} | {"ppo"}
    tree = ast.parse(Path(train.__file__).read_text())
    functions = {f.name: f for f in tree.body if isinstance(f, ast.FunctionDef)}
    for name in ("start", "describe", "save", "train", "main"):
        for node in ast.walk(functions[name]):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert node.value.id != "args" or node.attr not in own, (name, node.attr)
            if isinstance(node, ast.Name):
                assert node.id not in classes, (name, node.id)
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in own, (name, node.value)


def outcome(home, out, capsys, monkeypatch, **flags):
    """All results of a run except times: weights and state, log, report, printed lines."""
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run = types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda *_: None)
    init = lambda **k: (print(k["project"], k["name"]), run)[1]  # noqa: E731
    wandb = types.SimpleNamespace(init=init)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    defaults = {
        "out_dir": out,
        "init_from": home / "ckpt.pt",
        "data": home / ("a.jsonl" if "sft" in flags else ""),
        "tokenizer": home / f"tok{VOCAB}.model",
    }
    values = defaults | {k: str(v).replace("{}", str(home)) for k, v in flags.items()}
    if flags.get("reward", "length") != "length":
        del values["target_len"]
    if flags.get("decay_lr") is False:
        values.pop("warmup_iters", None)
    capsys.readouterr()
    try:
        main_without_writes([f"--{k}={v}" for k, v in values.items()], monkeypatch)
        error = ""
    except (Exception, SystemExit) as e:
        error = repr(e)
    times = r" *(?:\d+\.\d+ s\b|[\d.]+ ms|[\d,]+ tok/s|mfu +[\d.]+%|left \S+)|\"time.*"
    text = re.sub(times, "", capsys.readouterr().out)
    found = {"error": error, "text": text.replace(str(out), "")}
    for path in sorted(out.glob("*")):
        if path.name.endswith("ckpt.pt"):
            state = load_checkpoint(path)
            del state["config"]
            found[path.name] = state
        elif path.name.endswith(".jsonl"):
            records = map(json.loads, path.open())
            timed = ("ms", "mfu", "tokens_per_s", "time/")
            found[path.name] = [
                {k: v for k, v in r.items() if not k.startswith(timed)} for r in records
            ]
        elif path.suffix == ".json":
            found[path.name] = path.read_text()
    shutil.rmtree(out, ignore_errors=True)
    return found


def flat(x):
    """A nested state as one string, equal where every number is, to the bit."""
    if isinstance(x, dict):
        return "".join(f"{k}:{flat(v)}," for k, v in x.items() if k != "run_id")
    if isinstance(x, (list, tuple)):
        return "".join(f"{flat(v)}," for v in x)
    return str(x.double().cpu().numpy().tobytes()) if isinstance(x, torch.Tensor) else repr(x)


@pytest.mark.parametrize("stage, effects", [("--sft", SFT_EFFECTS), ("--ppo", PPO_EFFECTS)])
def test_every_flag_changes_something(home, tmp_path, capsys, monkeypatch, stage, effects):
    assert effects.keys() | ELSEWHERE[stage] == all_flags(capsys)[stage]
    before, idle = {}, []
    base = BASE[stage]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        pretraining, "peak_matmul_flops", lambda *_: 1e12
    )  # a second per run, for the MFU

    def run(**flags):
        given = {k: v for k, v in (base | flags).items() if v is not None}
        return flat(outcome(home, tmp_path / "out", capsys, monkeypatch, **given))

    plain = run()
    assert plain.startswith("error:'',")
    assert plain == run(), "two runs with the same flags differ"
    for name, (value, beside) in effects.items():
        key = repr(beside)
        before[key] = before.get(key) or (run(**beside) if beside else plain)
        if run(**beside | {name: value}) == before[key]:
            idle.append(name)
    assert idle == []
