"""Supervised fine-tuning: the loss to the token, packed = one by one, adapters, resumed runs."""

import io
import json
import random
import re
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_train import (  # noqa: F401
    assert_same_run,
    die_in_step,
    finish,
    keep_signals,
    processes,
    read_log,
    spawn,
)

import export
import kernels
import sample
import sft
import train
from checkpoint import (
    checkpoint_args,
    load_checkpoint,
    model_from_checkpoint,
    save_checkpoint,
)
from instruct import TEMPLATES, Instructions
from model import Generation, ModelArgs, Transformer, generate
from sft import FourBitLoRALinear, load_adapters
from tokenizer import Tokenizer

WORDS = "cat dog sun red big ran sat hat the a".split()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tokenizer, a random model, and instructions: say these words backwards."""
    import sentencepiece

    folder, rng = tmp_path_factory.mktemp("base"), random.Random(0)
    text = [" ".join(rng.choices(WORDS, k=6)) + "\n" for _ in range(200)]
    (folder / "text").write_text("".join(text))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "tok290"),
        vocab_size=290,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=3,
        num_threads=1,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    records = []
    for _ in range(120):
        words = rng.choices(WORDS, k=rng.randint(1, 6))
        records.append({"prompt": " ".join(words), "response": " ".join(reversed(words))})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    torch.manual_seed(0)
    args = ModelArgs(
        dim=16, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=290, multiple_of=4, max_seq_len=64
    )
    weights = Transformer(args).state_dict()
    save_checkpoint(folder / "ckpt.pt", {"model": weights, "model_args": checkpoint_args(args)})
    return folder


def command(base, out, **flags):
    """The flags of a tiny run in the folder `out`, where the base model is."""
    out.mkdir(exist_ok=True)
    for name in "ckpt.pt", "tok290.model":
        shutil.copy(base / name, out)
    values = (
        dict(
            sft=True,
            data=base / "data.jsonl",
            out_dir=out,
            batch_size=4,
            max_iters=8,
            eval_interval=4,
            eval_iters=3,
            learning_rate=1e-2,
            warmup_iters=3,
            device="cpu",
            log_interval=100,
        )
        | flags
    )
    return [f"--{k}={v}" for k, v in values.items()]


def stage_of(base, out, **flags):
    """A stage that has not begun."""
    return train.start(train.setup(train.flags(command(base, out, **flags))))


def one_by_one(model, samples):
    """The mean loss over all learnt tokens, each sample alone: no packing, no -1."""
    losses = []
    for ids, mask in samples:
        logp = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
        losses += [-logp[i, ids[i + 1]] for i in range(len(ids) - 1) if mask[i + 1]]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("native", ["0", "1"])
def test_packed_is_one_by_one_in_loss_and_gradient(base, native, rows, monkeypatch):
    monkeypatch.setenv("NATIVE_KERNELS", native)
    kernels.library.cache_clear()
    t = Tokenizer(base / "tok290.model")
    data = Instructions(f"{base}/data.jsonl", "train", t, TEMPLATES["plain"], 64)
    model = model_from_checkpoint(load_checkpoint(base / "ckpt.pt"))
    tokens, targets, lengths, expected, count = sft.Packed(data).batch(5, 7)
    assert count == int((targets != -1).sum())
    samples = data.batch(5, 7)
    learnt = sum(mask.count(True) for _, mask in samples)
    assert int((targets >= 0).sum()) == learnt and sum(lengths) == len(tokens)
    assert expected == 7 * sum(m.sum() for _, m in data.samples) / len(data)
    grads = []
    for loss in model(tokens, targets, lengths=lengths), one_by_one(model, samples):
        model.zero_grad()
        loss.backward()
        grads.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    kernels.library.cache_clear()


def test_each_token_counts_the_same_in_any_split(base, tmp_path):
    """A step of 8 samples equals 4 micro-batches of 2 and 2 processes with 2 micro-batches, up to
    rounding, although replies differ in length."""
    runs = {"one": dict(batch_size=8), "micro": dict(batch_size=2, gradient_accumulation_steps=4)}
    for name, flags in runs.items():
        train.main(command(base, tmp_path / name, **flags))
    argv = command(base, tmp_path / "two", **runs["micro"])
    assert [finish(p) for p in processes(2, argv, tmp_path)] == [0, 0]
    names = "one", "micro", "two"
    states = [load_checkpoint(tmp_path / n / "sft_ckpt.pt")["model"] for n in names]
    start = load_checkpoint(base / "ckpt.pt")["model"]
    for name, w in states[0].items():
        assert not torch.equal(w, start[name])
        for other in states[1:]:
            torch.testing.assert_close(other[name], w, atol=2e-4, rtol=1e-3)
    shown = [
        [r["loss/train"] for r in read_log(tmp_path / n, "sft_") if "loss/train" in r]
        for n in names
    ]
    assert len(shown[0]) == 8 and shown == [pytest.approx(shown[0], rel=1e-3)] * 3


def test_only_samples_of_this_rank_count_in_an_evaluation(base):
    """A rank without samples evaluates one as the others do, with the weight 0."""
    t = Tokenizer(base / "tok290.model")
    data = sft.Packed(Instructions(f"{base}/data.jsonl", "val", t, TEMPLATES["plain"], 64))
    batch = data.batch(0, 3)
    targets = sum(mask.count(True) for _, mask in data.samples.batch(0, 3))
    assert [sft.FineTuning.weight(None, batch, rows) for rows in (3, 0)] == [targets, 0]


def test_it_learns_and_the_loss_shown_is_that_of_the_replies(base, tmp_path, capsys):
    train.main(command(base, tmp_path / "a", max_iters=150, batch_size=16, eval_interval=150))
    out = capsys.readouterr().out
    assert " samples" in out and "  | prompt: " in out and "  | response: " in out
    checkpoint = load_checkpoint(tmp_path / "a/sft_ckpt.pt")
    assert checkpoint["template"]["turn"] == TEMPLATES["plain"].turn
    t = Tokenizer(base / "tok290.model")
    data = Instructions(f"{base}/data.jsonl", "val", t, TEMPLATES["plain"], 64)
    model = model_from_checkpoint(checkpoint).eval()
    with torch.no_grad():
        loss = float(one_by_one(model, data.batch(0, len(data))))
    log = read_log(tmp_path / "a", "sft_")
    assert log[-1]["loss/val"] == pytest.approx(loss, rel=1e-4)
    assert log[-1]["loss/val"] < 0.6 * log[0]["loss/val"]


def test_the_sample_is_a_reply_to_the_whole_prompt(base, tmp_path, monkeypatch):
    stage, asked = stage_of(base, tmp_path), []
    spy = lambda net, ids, *a, **k: asked.extend(ids) or generate(net, ids, *a, **k)  # noqa: E731
    monkeypatch.setattr(sft, "generate", spy)
    texts = stage.sample_texts()
    ids, mask = stage.val.samples.batch(0, 1)[0]
    assert asked == [ids[: mask.index(True)]] and ids[0] == stage.tokenizer.bos_id
    assert texts["prompt"].split() == stage.tokenizer.decode(asked[0]).split()


@pytest.mark.parametrize(
    "flags",
    [
        dict(dropout=0.1),
        dict(lora_rank=2, lora_dropout=0.1),
        dict(lora_rank=2, lora_4bit=True),
    ],
)
def test_resumes_to_the_bit(base, tmp_path, flags):
    if "lora_4bit" in flags:
        pytest.importorskip("bitsandbytes")
    train.main(command(base, tmp_path / "whole", **flags))
    argv = command(base, tmp_path / "stopped", **flags)
    hook = (die_in_step, 6, signal.SIGINT)
    assert finish(spawn(argv, tmp_path / "log.txt", hook=hook)) == 130
    assert load_checkpoint(tmp_path / "stopped/sft_ckpt.pt")["iter_num"] == 7
    train.main([*argv, "--init_from=resume"])
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", "sft_")


# ----------------------------------------------------------------------------
# adapters


def lora_state(folder):
    return load_checkpoint(folder / "sft_ckpt.pt"), torch.load(folder / "sft_lora.pt")


@pytest.mark.parametrize("four_bit", [False, True])
def test_adapters_beside_the_checkpoint_give_its_model(base, tmp_path, four_bit):
    if four_bit:
        pytest.importorskip("bitsandbytes")
    flags = dict(lora_rank=2, lora_alpha=3, lora_layers="q,k,v,o,gate,up,down")
    train.main(command(base, tmp_path / "a", lora_4bit=four_bit, **flags))
    checkpoint, kept = lora_state(tmp_path / "a")
    assert set(kept["lora"]["state"]) == {n for n in checkpoint["unmerged"] if ".lora_" in n}
    start = load_checkpoint(base / "ckpt.pt")
    for name, w in start["model"].items():
        trained = name.split(".")[-2] in ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
        assert torch.equal(w, checkpoint["model"][name]) == (not trained)
    merged, unmerged = model_from_checkpoint(checkpoint), model_from_checkpoint(start)
    load_adapters(unmerged, kept["lora"])
    x = torch.randint(0, 290, (3, 40))
    torch.testing.assert_close(merged.eval()(x), unmerged.eval()(x), atol=1e-5, rtol=1e-5)
    # the reference: the base with its adapters off
    for p in (p for n, p in unmerged.named_parameters() if n.endswith("lora_b")):
        torch.nn.init.zeros_(p)
    if not four_bit:
        assert torch.equal(unmerged(x), model_from_checkpoint(start).eval()(x))


def test_all_layers_can_be_frozen(base):
    model = model_from_checkpoint(load_checkpoint(base / "ckpt.pt"))
    sft.freeze_layers(model, 2)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["norm.weight"]
    for n in (3, -1):
        with pytest.raises(ValueError, match="the model has 2 layers"):
            sft.freeze_layers(model, n)


def test_muon_without_a_matrix_to_train(base, tmp_path, capsys):
    train.main(command(base, tmp_path, freeze_layers=2, optimizer="muon", max_iters=1))
    line = "note: --freeze_layers=2 freezes all layers: only norm.weight will be trained\n"
    assert line in capsys.readouterr().err
    start, end = (load_checkpoint(tmp_path / f"{name}ckpt.pt")["model"] for name in ("", "sft_"))
    assert [k for k in end if not torch.equal(start[k], end[k])] == ["norm.weight"]
    train.main(command(base, tmp_path, freeze_layers=1, max_iters=1))
    assert "--freeze_layers" not in capsys.readouterr().err


def test_adapters_of_another_model_are_refused(base, tmp_path):
    train.main(command(base, tmp_path / "a", lora_rank=2, max_iters=1))
    _, kept = lora_state(tmp_path / "a")
    for change in dict(dim=32), dict(n_layers=1), dict(n_layers=3):
        args = dict(dim=16, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=290) | change
        with pytest.raises(ValueError, match="adapters do not fit"):
            load_adapters(Transformer(ModelArgs(**args)), kept["lora"])
    for bad in None, {}, kept["lora"] | {"rank": 0}, kept["lora"] | {"layers": "x"}:
        with pytest.raises(ValueError, match="adapters do not fit"):
            load_adapters(model_from_checkpoint(load_checkpoint(base / "ckpt.pt")), bad)


@pytest.mark.parametrize("four_bit", [False, True])
def test_export_merges_adapters(base, tmp_path, capsys, four_bit):
    """Base + file of adapters = the checkpoint of the run, as a .pt and as a model.bin."""
    if four_bit:
        pytest.importorskip("bitsandbytes")
    folder, out = tmp_path / "a", tmp_path / "all.pt"
    train.main(command(base, folder, lora_rank=2, lora_layers="q,down", lora_4bit=four_bit))
    merge = [f"--checkpoint={base}/ckpt.pt", f"--merge_lora={folder}/sft_lora.pt"]
    export.main([str(out), *merge])
    one, two = load_checkpoint(out), load_checkpoint(folder / "sft_ckpt.pt")
    assert one["template"] == two["template"] and one["model"].keys() == two["model"].keys()
    for name, w in two["model"].items():
        torch.testing.assert_close(one["model"][name], w, atol=1e-6, rtol=1e-6)
    export.main([str(tmp_path / "all.bin"), *merge, "--format=fp32"])
    export.main(
        [
            str(tmp_path / "same.bin"),
            f"--checkpoint={out}",
            "--format=fp32",
            f"--tokenizer={base}/tok290.model",
        ]
    )
    assert (tmp_path / "all.bin").read_bytes() == (tmp_path / "same.bin").read_bytes()
    assert "was trained on" not in capsys.readouterr().err
    export.main([str(tmp_path / "b.bin"), f"--checkpoint={out}", merge[1]])
    other = f"trained on other weights ({folder}/ckpt.pt) than {out} has now"
    assert other in capsys.readouterr().err
    size = (folder / "sft_lora.pt").stat().st_size
    assert size < (folder / "sft_ckpt.pt").stat().st_size / 3  # of a model of 10,000 weights
    peft = tmp_path / "adapter_model.safetensors"
    pytest.importorskip("safetensors.torch").save_file({"a": torch.zeros(2)}, peft)
    for other in base / "ckpt.pt", peft:
        with pytest.raises(ValueError, match="has no adapters of train.py --sft"):
            export.main([str(out), merge[0], f"--merge_lora={other}"])
    [*_, weights] = torch.load(folder / "sft_lora.pt")["lora"]["state"].values()
    part = weights.numpy().tobytes()
    blob = (folder / "sft_lora.pt").read_bytes()
    (tmp_path / "hit.pt").write_bytes(blob.replace(part, part[:-1] + bytes([part[-1] ^ 64])))
    for kind in (
        (merge[0], f"--merge_lora={tmp_path}/hit.pt"),
        (f"--checkpoint={tmp_path}/hit.pt", "--format=peft"),
    ):
        with pytest.raises(ValueError, match="hit.pt is damaged: a checksum is wrong"):
            export.main([str(tmp_path / "x"), *kind])
    # The checkpoint of the run has them merged already.
    with pytest.raises(ValueError, match=f"merged already: .*trained on, {folder}/ckpt.pt, or"):
        export.main([str(tmp_path / "b.pt"), f"--checkpoint={folder}/sft_ckpt.pt", merge[1]])
    assert not (tmp_path / "b.pt").exists()


def nf4(w):
    """NF4 from its definition (Dettmers et al., 2023): of each 64 weights the largest is 1; the
    nearest of 16 levels for each."""
    levels = torch.tensor(
        [
            -1.0,
            -0.6961928,
            -0.5250731,
            -0.3949175,
            -0.2844414,
            -0.1847734,
            -0.0910500,
            0.0,
            0.0795803,
            0.1609302,
            0.2461123,
            0.3379152,
            0.4407098,
            0.5626170,
            0.7229568,
            1.0,
        ]
    )
    blocks = w.flatten().split(64)
    out = [
        levels[(b[:, None] / b.abs().max() - levels).abs().argmin(1)] * b.abs().max()
        for b in blocks
    ]
    return torch.cat(out).view_as(w)


@pytest.mark.parametrize("rows, columns", [(64, 64), (48, 288), (10, 7), (1, 64)])
def test_four_bits_are_nf4_and_the_gradient_goes_through(rows, columns):
    pytest.importorskip("bitsandbytes")
    linear = torch.nn.Linear(columns, rows, bias=False)
    four = FourBitLoRALinear(linear, 2, 4.0, 0.0)
    w = nf4(linear.weight.detach())
    torch.testing.assert_close(four.dequantized(), w, atol=1e-5, rtol=1e-5)
    assert four.packed.numel() * 2 + 64 > w.numel() and "weight" not in four.state_dict()
    torch.nn.init.normal_(four.lora_b)
    x = torch.randn(5, columns, requires_grad=True)
    grads = torch.autograd.grad(four(x).square().sum(), (x, four.lora_a, four.lora_b))
    whole = w + 2 * four.lora_b @ four.lora_a
    expected = torch.autograd.grad(F.linear(x, whole).square().sum(), (x, four.lora_a, four.lora_b))
    for a, b in zip(grads, expected):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


# ----------------------------------------------------------------------------
# sample.py --chat


def talk(folder, monkeypatch, capsys, lines, *flags):
    """Runs a chat. Returns its stdout, its stderr, and the prompts of the model."""
    prompts, generate = [], sample.generate

    def spy(model, ids, *args, **kwargs):
        prompts.extend(ids)
        return generate(model, ids, *args, **kwargs)

    monkeypatch.setattr(sample, "generate", spy)
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    capsys.readouterr()
    sample.main(
        [f"--checkpoint={folder}/sft_ckpt.pt", "--chat", "--device=cpu", "--temperature=0", *flags]
    )
    out = capsys.readouterr()
    return out.out, out.err, prompts


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """A folder with a model that was fine-tuned enough to end its replies."""
    folder = tmp_path_factory.mktemp("tuned")
    train.main(
        command(base, folder, max_iters=200, batch_size=16, eval_interval=200, warmup_iters=10)
    )
    return folder


def test_chat_gives_the_model_what_it_was_trained_on(tuned, monkeypatch, capsys):
    """The ids of a dialogue in training, in chat and in PPO's prompts are the same; a reply stays
    the ids that the model wrote."""
    t, template = Tokenizer(tuned / "tok290.model"), TEMPLATES["plain"]
    lines = ["cat dog", "  ", "the sun", "red"]
    out, err, prompts = talk(tuned, monkeypatch, capsys, lines, "--system=big hat")
    model = model_from_checkpoint(load_checkpoint(tuned / "sft_ckpt.pt")).eval()
    turns, shown = [], ""
    for line in ("cat dog", "the sun", "red"):
        prompt = template.prompt(t, [*turns, (line, None)], "big hat")
        assert prompts[len(turns)] == prompt
        [reply] = generate(model, [prompt], 60, temperature=0, stop_ids=(1, 2)).responses()
        assert reply[-1] == 2
        turns.append((line, reply[:-1]))
        shown += f"Assistant: {t.decode(reply)}\n"
    assert out == shown + "\n" and not err
    texts = [(user, t.decode(reply)) for user, reply in turns]
    if all(t.encode(b, False, False) == reply for (_, b), (_, reply) in zip(texts, turns)):
        ids, mask = template.dialogue(t, texts, "big hat")
        assert ids[: len(prompts[-1])] == prompts[-1] and not mask[len(prompts[-1]) - 1]


@pytest.mark.parametrize("system", ["", "big hat"])
def test_chat_in_c_says_the_same(tuned, monkeypatch, capsys, tmp_path, system):
    """run.c -m chat on the exported file, with its template: the same replies, also when the oldest
    turns have to go."""
    if not shutil.which("cc"):
        pytest.skip("needs a C compiler")
    source = Path(sample.__file__).with_name("run.c")
    subprocess.run(["cc", "-O1", source, "-o", tmp_path / "run", "-lm", "-pthread"], check=True)
    lines = ["cat dog sun", "the", "a red hat ran", "dog " * 10, "cat dog sun red big ran", "sun"]
    out, err, _ = talk(tuned, monkeypatch, capsys, lines, *[f"--system={system}"] * bool(system))
    command = [tmp_path / "run", tuned / "sft_model.bin", "-m", "chat", "-t", "0"]
    done = subprocess.run(
        [*command, *["-y", system] * bool(system)],
        check=True,
        text=True,
        errors="ignore",
        input="".join(f"{x}\n" for x in lines),
        capture_output=True,
    )
    # without the bytes of half characters, which C shows as they are
    python, c = (
        re.findall("Assistant: ?(.*)", re.sub(r"[^ -~\n]", "", text)) for text in (out, done.stdout)
    )
    assert len(python) == len(lines) and python == c and len("".join(c)) > 20
    forgot = [re.findall(r"forgetting the first (\d+) turns", text) for text in (err, done.stderr)]
    assert forgot[0] == forgot[1] != []


def test_chat_forgets_the_oldest_turns_and_says_so(tuned, monkeypatch, capsys):
    lines = ["cat dog sun red big"] * 8 + ["cat " * 70, "dog"]
    out, err, prompts = talk(tuned, monkeypatch, capsys, lines)
    assert len(prompts) == 9 and all(len(p) < 64 and p[0] == 1 for p in prompts)
    assert out.count("Assistant:") == 9 and out.endswith("\n\n")
    assert "(the context of 64 tokens is full: forgetting the first 1 turns)" in err
    assert err.count("that is too long for the context of 64 tokens") == 1
    _, err, _ = talk(tuned, monkeypatch, capsys, ["cat dog sun"], "--max_new_tokens=1")
    assert err == "(cut short: --max_new_tokens)\n"


@pytest.mark.parametrize("system", ["", "big hat"])
def test_chat_has_the_longest_dialogue_that_leaves_room_for_one_token(
    base, monkeypatch, capsys, system
):
    """Against a search that encodes whole dialogues; replies have random lengths."""
    t, template, rng = Tokenizer(base / "tok290.model"), TEMPLATES["plain"], random.Random(1)
    lines = [" ".join(rng.choices(WORDS, k=rng.randint(1, 9))) for _ in range(150)]
    turns, sizes, cut, forgot, full = [], [], [], [], "the context of 64 tokens is full"

    def reply(model, prompts, most, *sampling, stop_ids, on_token):
        turns.append((lines[len(turns)], None))
        first, prompt = len(turns), []
        while first and len(more := template.prompt(t, turns[first - 1 :], system)) < 64:
            first, prompt = first - 1, more
        assert prompts == [prompt] and stop_ids == {1, 2, 99}
        limit = min(most, 65 - len(prompt))  # the last token is not fed back
        ids, ended = [5] * rng.randint(0, limit), rng.random() < 0.7
        ids = [*ids[: limit - 1], 2] if ended else [5] * limit
        turns[-1] = lines[len(turns) - 1], ids[:-1] if ended else ids
        sizes.append(len(prompt))
        if first > max(forgot, default=0):
            forgot.append(first)
        if not ended:
            cut.append("--max_new_tokens" if limit < 65 - len(prompt) else full)
        lengths, none = torch.tensor([len(ids)]), torch.zeros(1, 0)
        return Generation(torch.tensor([ids]), lengths, none, torch.tensor([ended]))

    monkeypatch.setattr(sample, "generate", reply)
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    args = SimpleNamespace(system=system, max_new_tokens=9, temperature=0, top_k=0, top_p=1)
    model = SimpleNamespace(args=SimpleNamespace(max_seq_len=64))
    sample.chat(model, t, template, [99], args)
    err = capsys.readouterr().err
    assert re.findall(r"cut short: (.*)\)", err) == cut and len(set(cut)) == 2
    assert [int(n) for n in re.findall(r"forgetting the first (\d+)", err)] == forgot
    assert len(turns) == 150 and {62, 63} < set(sizes)


def test_chat_mistakes(tuned, tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="cannot be combined with --interactive"):
        talk(tuned, monkeypatch, capsys, [], "--start=x")
    _, err, _ = talk(tuned, monkeypatch, capsys, [], "--template=llama2")
    assert "note: --template=llama2 replaces the checkpoint's template '{bos}{user}" in err
    with pytest.raises(ValueError, match="need --chat"):
        sample.main([f"--checkpoint={tuned}/sft_ckpt.pt", "--system=x"])
    state = load_checkpoint(tuned / "sft_ckpt.pt")
    state["template"] = {"turn": "{bos}{user}{reply}{eos}", "system": ""}
    save_checkpoint(tmp_path / "sft_ckpt.pt", state)
    shutil.copy(tuned / "tok290.model", tmp_path)
    with pytest.raises(ValueError, match="no place for a system prompt"):
        talk(tmp_path, monkeypatch, capsys, ["x"], "--system=x")


# ----------------------------------------------------------------------------
# mistakes


def test_mistakes(base, tmp_path, monkeypatch):
    def refused(message, **flags):
        with pytest.raises((ValueError, OSError), match=message):
            train.main(command(base, tmp_path / "x", **flags))

    refused("one stage at a time", ppo=True)
    refused(f"{base} is a folder: name a JSON or JSONL file .* with --data$", data=base)
    refused(f"{base} is a folder: name .* with --val_data$", val_data=base)
    refused(f"{base} is a folder: name .* with --val_data$", val_data=f"{base}/data.jsonl,{base}")
    refused("No such file", data=base / "none.json")
    refused("expected plain, llama2", template="x")
    refused("dialogues need the tokenizer of the model", init_from=strip(base, tmp_path))
    train.main(command(base, tmp_path / "a", lora_rank=2, max_iters=1))
    for flags in dict(lora_rank=3), dict(), dict(lora_rank=2, lora_layers="o"):
        with pytest.raises(ValueError, match="other adapters"):
            train.main(command(base, tmp_path / "a", init_from="resume", **flags))
    train.main(
        command(
            base,
            tmp_path / "b",
            init_from=tmp_path / "a/sft_ckpt.pt",
            template="llama2",
            max_iters=2,
        )
    )
    assert "[INST]" in load_checkpoint(tmp_path / "b/sft_ckpt.pt")["template"]["turn"]
    for name, value, why in (
        ("lora_alpha", 0, "must be above 0"),
        ("lora_alpha", -1, "must not be negative"),
        ("lora_dropout", 1, "must be below 1"),
        ("lora_rank", -1, "must not be negative"),
    ):
        refused(f"--{name} {why}", **{"lora_rank": 2, name: value})
    refused("--lora_alpha must be above 0", lora_rank=2, lora_alpha=0, sft=False, ppo=True)
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    refused("pip install bitsandbytes", lora_rank=2, lora_4bit=True)


def strip(base, folder):
    """The base model with a vocabulary for which there is no tokenizer."""
    args = dict(dim=16, n_layers=2, n_heads=4, vocab_size=291, multiple_of=4)
    weights = Transformer(ModelArgs(**args)).state_dict()
    save_checkpoint(folder / "other.pt", {"model": weights, "model_args": args})
    return folder / "other.pt"


def test_held_out_file(base, tmp_path, capsys):
    lines = (base / "data.jsonl").read_text().splitlines()
    (tmp_path / "val.jsonl").write_text("\n".join(lines[:9]))
    train.main(command(base, tmp_path / "a", val_data=tmp_path / "val.jsonl", max_iters=1))
    out = capsys.readouterr().out
    assert "val.jsonl: 9 samples" in out and "data.jsonl: 120 samples" in out


def test_the_order_of_held_out_files_does_not_depend_on_the_seed(base, tmp_path):
    """Otherwise evaluations of two runs would see other samples."""
    flags = dict(val_data=base / "data.jsonl")
    one, two = (stage_of(base, tmp_path / str(s), seed=s, **flags) for s in (1, 2))
    assert one.val.samples.batch(0, 9) == two.val.samples.batch(0, 9)
    assert one.train.samples.batch(0, 9) != two.train.samples.batch(0, 9)


def test_the_summary_names_ignored_keys(base, tmp_path, capsys):
    lines = (base / "data.jsonl").read_text().splitlines()
    lines[3] = json.dumps({**json.loads(lines[3]), "mood": "glad"})
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    train.main(command(base, tmp_path / "a", data=tmp_path / "x.jsonl", max_iters=1))
    assert capsys.readouterr().out.count('(1 with "mood", which is ignored)') == 1


def test_indentation_of_replies_is_learned(base, tmp_path):
    """What is fed to the model, decoded: the reply as the file has it."""
    code = "    return x\n"
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "def f(x):", "response": code}))
    t = Tokenizer(base / "tok290.model")
    data = Instructions(str(tmp_path / "x.jsonl"), "all", t, TEMPLATES["plain"], 64)
    ids, mask = data.batch(0, 1)[0]
    assert t.decode([i for i, m in zip(ids, mask) if m]) == code and not data.counts
