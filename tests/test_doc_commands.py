"""The commands of README.md and doc/: each runs, in the order of the pages, in a folder like a new
user's, with settings that make it small. A command that needs a network, a GPU or hours is listed
with the reason, and its flags are parsed."""

import contextlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import export
import instruct
import sample
import tinystories
import tokenizer
import train

ROOT = Path(train.__file__).resolve().parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "doc").glob("*.md"))]
SCRIPTS = {
    f"{module.__name__}.py": module
    for module in (train, sample, export, tokenizer, tinystories, instruct)
}
PROGRAMS = "python", "make", "./run", "torchrun", ".venv/bin/python"

# Why a command that starts like this is not run here. All others that call Python or ./run are.
NOT_RUN = {
    "python tinystories.py download": "needs a network; test_data.py has a local server",
    "python tinystories.py train_vocab --vocab_size=4096": "needs more text; README.md: 512 tokens",
    "python tinystories.py pretokenize --vocab_size=4096": "needs that vocabulary",
    "python experiments/frontier.py --checkpoint": "hours; test_ppo.py runs it with fake runs",
    "python experiments/frontier.py --draw": "test_report.py draws this picture",
    "python experiments/endings.py": "needs a trained policy; test_ppo.py tests its numbers",
    "python experiments/story_task.py": "needs `make rlhf`; test_align.py runs a tiny chain",
    "python experiments/preference_data.py": "minutes; its stages are the commands of the README",
    "python experiments/lifted.py": "needs a model of 1.1B parameters",
    "python bench/": "minutes, and other projects",
    "python train.py --plan": "runs in test_report.py",
    "python serve.py": "runs until Ctrl-C; test_serve.py starts it",
    "python export.py out/ckpt.pt --meta": "needs Meta's files; test_import.py writes some",
    "python -c": "not a program of this project",
    "torchrun": "runs in test_commands.py",
    "make": "`make -n` shows that the target exists",
    # Rows of a table, to be completed with the flags of the README:
    "python train.py --vocab_source=custom --vocab_size=4096": "runs in test_commands.py",
    "python train.py --sft": None,
    "python train.py --rm": None,
    "python train.py --ppo": None,
    "python train.py --dpo --dpo_beta=0.1": None,
    "python train.py --ppo --advantage=rloo --group_size=4": None,
    "python train.py --ppo --advantage=grpo --group_size=4": None,
    "./run model.bin -z tokenizer.bin": "runs in test_commands.py",
    "./run model_q80.bin": "runs in test_run.py",
    "./run --help": "runs in test_run.py",
    "./run -m chat": None,
}
WHOLE = {k for k, why in NOT_RUN.items() if why is None}  # only the command without more flags

# What makes a command small; a flag that comes twice counts as it is given last.
SMALL = """--device=cpu --max_iters=2 --eval_iters=1 --batch_size=2 --reference_samples=2
    --max_gen_len=8""".split()
SMALL_MODEL = "--dim=16 --n_layers=2 --n_heads=2 --n_kv_heads=1 --max_seq_len=256".split()
SMALL_PPO = """--device=cpu --batch_size=4 --rollouts=4 --max_gen_len=12 --roof_prompts=1
    --roof_samples=2 --report_rollouts=4 --ppo_iters=1 --ppo_epochs=1""".split()


def commands_of(text):
    """The commands in the code blocks of a page, and in its inline code, in their order. Lines that
    end in a backslash are joined, and && separates two commands."""
    found = []
    blocks = r"^```\w*\n(.*?)^```$|`([^`\n]+)`"
    for block, inline in re.findall(blocks, text, re.MULTILINE | re.DOTALL):
        for line in (block or inline).replace("\\\n", " ").splitlines():
            for command in line.split(" && "):
                if command.startswith(tuple(f"{p} " for p in PROGRAMS)):
                    words = [w for w in shlex.split(command, comments=True) if w != "..."]
                    words = [re.sub("=N$", "=1", w) for w in words if not w.endswith("=...")]
                    found.append(words)
    return found


def is_run(words):
    line = " ".join(words)
    return not any(line == k if k in WHOLE else line.startswith(k) for k in NOT_RUN)


COMMANDS = {page.name: commands_of(page.read_text()) for page in PAGES}


def test_every_page_has_its_commands():
    """And each reason in NOT_RUN belongs to a command."""
    every = [" ".join(words) for commands in COMMANDS.values() for words in commands]
    assert len(every) > 60 and len(COMMANDS["README.md"]) > 20
    unused = [k for k in NOT_RUN if not any(line.startswith(k) for line in every)]
    assert not unused
    assert sum(map(is_run, (words for c in COMMANDS.values() for words in c))) > 35
    assert not any("$" in line for line in every)  # zsh does not split a variable into words
    text = "```\npython f.py --a=1 \\\n    -b # c\n```\nwith `make x && ./run m`"
    found = [["python", "f.py", "--a=1", "-b"], ["make", "x"], ["./run", "m"]]
    assert commands_of(text) == found


# ----------------------------------------------------------------------------
# flags


class Parsed(Exception):
    pass


@pytest.mark.parametrize("page", COMMANDS)
def test_flags_are_those_of_the_programs(page, monkeypatch, capsys):
    """Of each command, also of those that do not run here."""
    for words in COMMANDS[page]:
        if words[0] == "make":
            if shutil.which("make"):
                done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True)
                assert done.returncode == 0, (words, done.stderr)
            continue
        if words[0] == "./run":
            usage = (ROOT / "run.c").read_text()
            assert all(f"  {w} " in usage for w in words if re.fullmatch("-[a-z]", w)), words
            continue
        if words[1] == "-c":
            continue
        script = next(i for i, w in enumerate(words) if w.endswith(".py"))
        name = words[script].removesuffix(".py").replace("/", ".")
        if name == "serve" and not importlib.util.find_spec("uvicorn"):
            continue
        module = importlib.import_module(name)
        parse = module.parse_args

        def parse_only(parser, argv=None, unused=None, parse=parse):
            parse(parser, argv, unused)
            raise Parsed

        with monkeypatch.context() as m:
            m.setattr(module, "parse_args", parse_only)
            m.setattr(sys, "argv", words[script:])
            try:
                with pytest.raises(Parsed):
                    module.main()
            except SystemExit:
                raise AssertionError((words, capsys.readouterr().err)) from None


# ----------------------------------------------------------------------------
# runs


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A new user's folder: stories, text and instructions of one's own, ./run, and the files that
    the pages name by example."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    folder, before = tmp_path_factory.mktemp("user"), os.getcwd()
    os.chdir(folder)
    subprocess.run([compiler, "-O1", "-o", "run", ROOT / "run.c", "-lm", "-pthread"], check=True)
    tinystories.main(["synthesize", "--stories=600"])
    stories = Path("data/TinyStories_all_data/data00.json").read_text()
    texts = [s["story"] for s in json.loads(stories)]
    os.mkdir("mytext")
    Path("mytext/book.txt").write_text("\n\n".join(texts * 2))
    words = "cat dog sun red big ran sat hat".split()
    asked = [f"Say {a}, {b} and {c}." for a in words for b in words for c in words[:2]]
    rows = [{"instruction": x, "output": "please: " + x} for x in asked]
    Path("instructions.json").write_text(json.dumps(rows))
    rows = [{"prompt": x, "chosen": "please: " + x, "rejected": "No."} for x in asked]
    Path("preferences.json").write_text(json.dumps(rows))
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    Path(re.match(r"def (\w+)", code)[1] + ".py").write_text(code)
    yield folder
    os.chdir(before)


def small(words):
    """The flags that make a command small."""
    script, argv = words[1], words[2:]
    if script == "train.py" and "--plot" not in argv:
        if any(flag.startswith("--ppo") for flag in argv):
            return SMALL_PPO
        if any(flag in argv for flag in ("--rm", "--dpo")):
            return SMALL
        flags = [f for f in SMALL if not f.startswith(("--reference", "--max_gen"))]
        return flags if "--sft" in argv else flags + SMALL_MODEL
    prompts = ["--prompts=8"] if argv[:1] in (["judge"], ["pairs"]) else []
    return {"sample.py": ["--max_new_tokens=16"], "instruct.py": prompts}.get(script, [])


def run(words, monkeypatch):
    """Runs one command in the current folder, with "Hello" and an empty line on its input."""
    words = ["python", *words[1:]] if words[0].endswith("/python") else words
    if words[0] == "./run":
        argv = [*words, "-n", "16"]
        done = subprocess.run(argv, input=b"Hello\n\n", capture_output=True, timeout=60)
        assert done.returncode == 0 and done.stdout, (words, done.stderr)
        return done.stdout.decode(errors="replace")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        try:
            status = SCRIPTS[words[1]].main([*words[2:], *small(words)])
        except (Exception, SystemExit) as e:
            raise AssertionError((words, repr(e), shown.getvalue())) from e
    assert not status and shown.getvalue(), words
    return shown.getvalue()


def run_page(name, monkeypatch):
    """Runs the commands of a page; returns their number."""
    commands = list(filter(is_run, COMMANDS[name]))
    for words in commands:
        run(words, monkeypatch)
    return len(commands)


@pytest.fixture(scope="module")
def readme(home):
    """Runs the commands of README.md, in their order."""
    models = "SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct.Q4_1.gguf"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(train, "plot_at_end", lambda path: None)
        done = []
        for words in filter(is_run, COMMANDS["README.md"]):
            if any(word.endswith(models) for word in words):  # the import of a real model
                for module in ("safetensors", "tokenizers", "gguf"):
                    pytest.importorskip(module)
                how = [models[1]] if words[-1].endswith(models[1]) else ["path/to/" + models[0]]
                how += ["--format=hf"] if how != [models[1]] else []
                export.main([*how, "--checkpoint=out/ckpt.pt"])
            run(words, monkeypatch)
            done.append(" ".join(words))
    return done


def test_commands_of_the_readme_run(readme):
    assert len(readme) >= 18 and sum("train.py" in line for line in readme) >= 8
    for name in ("ckpt.pt", "ppo_ckpt.pt", "sft_ckpt.pt", "rm_ckpt.pt", "dpo_ckpt.pt"):
        assert Path("out", name).exists()
    assert Path("mymodel/tok1024.model").exists() and Path("model.bin").exists()


@pytest.mark.parametrize("page, n", [("rlhf.md", 10), ("formats.md", 4), ("run.md", 2)])
def test_commands_of_a_page_run(readme, page, n, monkeypatch):
    assert run_page(page, monkeypatch) >= n


def test_commands_for_people_from_other_projects_run(readme, monkeypatch):
    shutil.copy("preferences.json", "FILE.jsonl")
    records = json.loads(Path("preferences.json").read_text())
    Path("FILE.jsonl").write_text("\n".join(map(json.dumps, records)))
    shutil.copytree("path/to/SmolLM2-135M-Instruct", "FOLDER", dirs_exist_ok=True)
    assert run_page("coming-from.md", monkeypatch) >= 8


def next_commands():
    """The commands that `make demo` proposes at its end."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    shown = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True).stdout
    return [shlex.split(line, comments=True) for line in re.findall(r"echo '  (.*)'", shown)]


def test_what_make_demo_proposes_works(readme, monkeypatch):
    commands = next_commands()
    assert len(commands) == 3
    os.makedirs("out/demo", exist_ok=True)
    for name in ("log.jsonl", "ppo_log.jsonl"):
        shutil.copy(f"out/{name}", "out/demo")
    shutil.copy("model.bin", "out/demo")
    for words in commands:
        if words[0] == "make":
            done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True)
            assert done.returncode == 0, done.stderr
        else:
            run(words, monkeypatch)
