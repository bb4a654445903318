"""
The identity of tokenizers: models, shards and files store the hash of their tokenizer, and another
vocabulary of the same size is either ignored or an error of one line that names both.
"""

import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_bpe
from test_train import keep_signals  # noqa: F401

import export
import instruct
import sample
import tinystories
import train
from checkpoint import load_checkpoint, save_checkpoint
from tokenizer import Tokenizer, find_tokenizer

N = 300
WORDS = {
    "a": "cat dog sun red big ran sat hat the a",
    "b": "otter plum grey tiny swam hid coat one",
}
TINY = dict(
    vocab_source="custom",
    vocab_size=N,
    dim=16,
    n_layers=1,
    n_heads=2,
    n_kv_heads=2,
    multiple_of=4,
    max_seq_len=64,
    batch_size=2,
    max_iters=2,
    eval_interval=2,
    eval_iters=1,
    device="cpu",
)
TEXT = dict(batch_size=2, max_iters=1, eval_interval=1, eval_iters=1, device="cpu")
PPO = TEXT | dict(
    ppo=True,
    ppo_iters=1,
    rollouts=4,
    max_gen_len=8,
    start_len=4,
    roof_prompts=1,
    roof_samples=2,
    report_rollouts=2,
    ppo_epochs=1,
)
OF_FILE = {k: v for k, v in PPO.items() if k != "start_len"}  # which is for stories alone


def write_stories(folder, kind):
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(kind)
    for name in "xy":
        lines = [" ".join(rng.choices(WORDS[kind].split(), k=9)) + "." for _ in range(300)]
        (folder / f"{name}.txt").write_text("\n\n".join(lines))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with two vocabularies of the same size in folders of stories, a/ and b/, each with
    shards; the pretrained model outa/ of a/; its reward model outa/rm_ckpt.pt; instructions."""
    folder = tmp_path_factory.mktemp("made")
    old = os.getcwd()
    os.chdir(folder)
    try:
        for kind in "ab":
            write_stories(Path(kind), kind)
            tinystories.main(["train_vocab", f"--data_dir={kind}", f"--vocab_size={N}"])
            tinystories.main(["pretokenize", f"--data_dir={kind}", f"--vocab_size={N}"])
        rng = random.Random(0)
        records = [
            {
                "prompt": " ".join(rng.choices(WORDS["a"].split(), k=3)) + f" {i}",
                "response": "the cat",
            }
            for i in range(40)
        ]
        Path("i.jsonl").write_text("\n".join(map(json.dumps, records)))
        pairs = [{"prompt": r["prompt"], "chosen": "a dog", "rejected": "sun"} for r in records]
        Path("p.jsonl").write_text("\n".join(map(json.dumps, pairs)))
        run_train(data="a", out_dir="outa", **TINY)
        run_train(
            rm=True,
            data="p.jsonl",
            out_dir="outa",
            reference_samples=2,
            tokenizer="a/tok300.model",
            **TEXT,
        )
    finally:
        os.chdir(old)
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A copy of `made`, which is the current folder."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_train(**flags):
    return train.main([f"--{k}={v}" for k, v in flags.items()])


def hash_of(path):
    return Tokenizer(path).hash


def forget(path):
    """A checkpoint as llama2.c and older commits of ours write it."""
    checkpoint = load_checkpoint(path)
    checkpoint.pop("tokenizer_hash", None)
    save_checkpoint(path, checkpoint)


def embedded(path):
    """The tokenizer in a model.bin, as bytes."""
    data = Path(path).read_bytes()
    at, size = np.frombuffer(data, "<u8", 2, 64).tolist()
    return data[at : at + size]


def text_of(checkpoint, capsys, *more, assumes=""):
    """What sample.py writes. `assumes` is the tokenizer that it says it assumes, on one line."""
    capsys.readouterr()
    sample.main(
        [
            f"--checkpoint={checkpoint}",
            "--start=the cat",
            "--max_new_tokens=9",
            "--device=cpu",
            *more,
        ]
    )
    out, err = capsys.readouterr()
    assert err.count("assuming") == err.count(f"assuming {assumes}\n") == bool(assumes)
    return out


def raises(what, call, *args, **kwargs):
    """The call ends in an error of one line."""
    with pytest.raises((ValueError, OSError), match=what) as e:
        call(*args, **kwargs)
    assert "\n" not in str(e.value)


# ----------------------------------------------------------------------------
# the three stories that went wrong


def test_another_vocabulary_in_data(here, capsys):
    """A model from elsewhere with its tokenizer in its folder, and another tokenizer in data/."""
    (here / "data").mkdir()
    shutil.copy("b/tok300.model", "data")
    (here / "c").mkdir()
    shutil.move("outa/ckpt.pt", "c/model.pt")
    shutil.copy("a/tok300.model", "c")
    forget("c/model.pt")
    run_train(sft=True, init_from="c/model.pt", data="i.jsonl", out_dir="new", **TEXT)
    lines = [line for line in capsys.readouterr().err.splitlines() if "assuming" in line]
    assert len(lines) == 1 and "c/model.pt" in lines[0] and "c/tok300.model" in lines[0]
    right = hash_of("a/tok300.model")
    assert load_checkpoint("new/sft_ckpt.pt")["tokenizer_hash"] == right
    assert hash_of("new/tok300.model") == right
    blob = Tokenizer("a/tok300.model").for_llama2c()
    assert embedded("new/sft_model.bin") == blob
    text = text_of("new/sft_ckpt.pt", capsys)
    assert text == text_of("new/sft_ckpt.pt", capsys, "--tokenizer=a/tok300.model")
    export.main(["m.bin", "--checkpoint=new/sft_ckpt.pt"])
    assert embedded("m.bin") == blob
    # without the copy the other one is refused, not taken
    os.remove("new/tok300.model")
    capsys.readouterr()
    for command in (
        lambda: text_of("new/sft_ckpt.pt", capsys),
        lambda: export.main(["m.bin", "--checkpoint=new/sft_ckpt.pt"]),
        lambda: run_train(
            sft=True, init_from="new/sft_ckpt.pt", data="i.jsonl", out_dir="newer", **TEXT
        ),
    ):
        raises("data/tok300.model is not the tokenizer of new/sft_ckpt.pt", command)


def test_train_vocab_again_in_the_same_folder(here, capsys):
    """The model keeps its vocabulary, the shards of the other one are no text for it."""
    old, expected = hash_of("a/tok300.model"), text_of("outa/ckpt.pt", capsys)
    write_stories(here / "a", "b")
    tinystories.main(["train_vocab", "--data_dir=a", f"--vocab_size={N}"])
    out = capsys.readouterr().out
    assert "pretokenize --vocab_size=300 --data_dir=a" in out and f"a/tok300.{old[:8]}.model" in out
    assert hash_of("a/tok300.model") != old == hash_of(f"a/tok300.{old[:8]}.model")
    # the shards are still the old ones: the run continues with its own tokenizer
    run_train(data="a", out_dir="outa", init_from="resume", **TINY | {"max_iters": 3})
    assert load_checkpoint("outa/ckpt.pt")["tokenizer_hash"] == old == hash_of("outa/tok300.model")
    shutil.copy("a/tok300.model", "tok300.model")
    tinystories.main(["pretokenize", "--data_dir=a", f"--vocab_size={N}"])
    assert "2 shards written" in capsys.readouterr().out
    flags = TINY | {"max_iters": 4}
    raises(
        "a/tok300 was made with another tokenizer .* than outa/ckpt.pt",
        run_train,
        data="a",
        out_dir="outa",
        init_from="resume",
        **flags,
    )
    assert expected and text_of("outa/ckpt.pt", capsys)
    export.main(["m.bin", "--checkpoint=outa/ckpt.pt"])
    assert embedded("m.bin") == Tokenizer(f"a/tok300.{old[:8]}.model").for_llama2c()
    # without the copy in out_dir, the one with its hash in the name is found in the data folder
    os.remove("outa/tok300.model")
    export.main(["m.bin", "--checkpoint=outa/ckpt.pt"])
    assert embedded("m.bin") == Tokenizer(f"a/tok300.{old[:8]}.model").for_llama2c()
    os.remove(f"a/tok300.{old[:8]}.model")
    raises("is not the tokenizer of outa/ckpt.pt", text_of, "outa/ckpt.pt", capsys)
    raises(
        "is not the tokenizer of outa/ckpt.pt", export.main, ["n.bin", "--checkpoint=outa/ckpt.pt"]
    )
    assert not os.path.exists("n.bin")


def test_user_stories_next_to_a_data_folder(here, capsys):
    shutil.copytree("b", "data")
    shutil.move("a", "mystories")
    run_train(data_dir="mystories", out_dir="own", **TINY)  # another name of --data
    right = Tokenizer("mystories/tok300.model")
    assert load_checkpoint("own/ckpt.pt")["tokenizer_hash"] == right.hash
    assert embedded("own/model.bin") == right.for_llama2c()
    shutil.rmtree("mystories")
    expected = text_of("own/ckpt.pt", capsys, "--tokenizer=own/tok300.model")
    assert text_of("own/ckpt.pt", capsys) == expected


def test_shards_without_meta_and_models_without_a_hash(here, capsys):
    """What older commits wrote is read, with one line each that says what is assumed; the data
    folder of the run is searched before data/."""
    shutil.copytree("b", "data")
    os.remove("a/tok300/shards.meta")
    shutil.rmtree("outa")
    capsys.readouterr()
    run_train(data="a", out_dir="outa", **TINY)
    lines = capsys.readouterr().err.splitlines()
    assert [x for x in lines if "assuming" in x] == [
        "note: a/tok300 does not say which tokenizer it was made with: assuming a/tok300.model"
    ]
    forget("outa/ckpt.pt")
    os.remove("outa/tok300.model")
    text_of("outa/ckpt.pt", capsys, assumes="a/tok300.model")


# ----------------------------------------------------------------------------
# every command refuses


@pytest.mark.parametrize(
    "flags",
    [
        dict(data="b", init_from="resume", **TINY | {"max_iters": 3}),
        dict(data="b", init_from="outa/ckpt.pt", **TINY | {"out_dir": "new"}),
        dict(data="a:0.5,b:0.5", **TINY | {"out_dir": "new"}),
        dict(data="b", init_from="resume", **PPO),
        dict(data="a", ptx_coef=0.1, ptx_data="b", **PPO),
        dict(data="i.jsonl", ptx_coef=0.1, ptx_data="b", **OF_FILE),
        dict(data="a", tokenizer="b/tok300.model", **TINY | {"out_dir": "new"}),
        dict(data="a", tokenizer="b/tok300.model", init_from="resume", **TINY | {"max_iters": 3}),
        dict(data="i.jsonl", tokenizer="b/tok300.model", sft=True, **TEXT),
        dict(data="p.jsonl", tokenizer="b/tok300.model", rm=True, **TEXT),
        dict(data="p.jsonl", tokenizer="b/tok300.model", dpo=True, **TEXT),
        dict(data="a", tokenizer="b/tok300.model", **PPO),
    ],
)
def test_train_refuses(here, flags):
    flags = {"out_dir": "outa"} | flags

    def files():  # run.lock says that a run is there, and stays
        return sorted(
            p.name for d in ("outa", "new") for p in here.glob(f"{d}/*") if p.name != "run.lock"
        )

    before = files()
    raises(r"b/tok300", run_train, **flags)
    assert files() == before


@pytest.mark.parametrize(
    "flag, path",
    [
        ("reward", "outa/rm_ckpt.pt"),
        ("value_model", "outa/rm_ckpt.pt"),
        ("value_model", "outa/ckpt.pt"),
    ],
)
def test_reward_and_value_models(here, flag, path, capsys):
    """They read the policy's ids: their tokenizer must be the same."""
    other = load_checkpoint(path)
    other["tokenizer_hash"] = hash_of("b/tok300.model")
    other.pop("template", None)  # the policy has none
    save_checkpoint("other.pt", other)
    run = dict(data="a", out_dir="outa", **PPO)
    raises("other.pt was made with another tokenizer", run_train, **run, **{flag: "other.pt"})
    forget("other.pt")
    capsys.readouterr()
    run_train(**run, **{flag: "other.pt"})
    assert "other.pt does not say which tokenizer" in capsys.readouterr().err


def test_other_commands_refuse(here):
    wrong = "--tokenizer=b/tok300.model"
    raises(
        "b/tok300.model is not the tokenizer of outa/ckpt.pt",
        sample.main,
        ["--checkpoint=outa/ckpt.pt", wrong],
    )
    for more in ([], ["--version=2"], ["--version=0"], ["--format=hf"], ["--format=gguf"]):
        raises(
            "b/tok300.model is not the tokenizer of outa/ckpt.pt",
            export.main,
            ["m", "--checkpoint=outa/ckpt.pt", wrong, *more],
        )
    assert not os.path.exists("m")
    (here / "a/task").mkdir()
    for name in "val", "sft":
        (here / f"a/task/{name}.jsonl").write_text('{"prompt": "Words: cat.", "response": "a cat"}')
    for stage in "judge", "pairs":
        raises(
            "b/tok300.model is not the tokenizer of outa/ckpt.pt",
            instruct.main,
            [stage, "--checkpoint=outa/ckpt.pt", "--data=a", "--device=cpu", wrong],
        )


def test_another_tokenizer_at_the_destination(here, capsys):
    """Another tokenizer in out_dir is never overwritten: a later stage refuses, a new run of
    pretraining moves it aside, and the model before it finds it there."""
    (here / "new").mkdir()
    shutil.copy("b/tok300.model", "new")
    sft = dict(sft=True, init_from="outa/ckpt.pt", data="i.jsonl", out_dir="new", **TEXT)
    raises("new/tok300.model is another tokenizer than", run_train, **sft)
    assert sorted(os.listdir("new")) == ["run.lock", "tok300.model"]
    old = hash_of("outa/tok300.model")
    run_train(data="b", out_dir="outa", **TINY)
    assert hash_of("outa/tok300.model") == hash_of("b/tok300.model")
    assert hash_of(f"outa/tok300.{old[:8]}.model") == old
    export.main(["m.bin", "--checkpoint=outa/ckpt.replaced.pt"])
    assert embedded("m.bin") == Tokenizer(f"outa/tok300.{old[:8]}.model").for_llama2c()


# ----------------------------------------------------------------------------
# what carries it


def test_adapters_and_exported_files(here, capsys):
    right = hash_of("a/tok300.model")
    run_train(sft=True, data="i.jsonl", out_dir="outa", lora_rank=2, **TEXT)
    assert load_checkpoint("outa/sft_ckpt.pt")["tokenizer_hash"] == right
    lora = "--merge_lora=outa/sft_lora.pt"
    export.main(["all/m.pt", "--checkpoint=outa/ckpt.pt", lora])
    assert load_checkpoint("all/m.pt")["tokenizer_hash"] == right == hash_of("all/tok300.model")
    assert Path("outa/model.bin").read_bytes()[224:256].hex() == right
    for version in "123":
        export.main([f"v{version}.bin", "--checkpoint=outa/ckpt.pt", f"--version={version}"])
        assert Path(f"v{version}.bin").read_bytes()[224:256].hex() == right
    pytest.importorskip("safetensors")
    import safetensors

    export.main(["hf", "--checkpoint=outa/ckpt.pt", "--format=hf"])
    assert json.loads(Path("hf/config.json").read_text())["tokenizer_hash"] == right
    export.main(["back/c.pt", "--hf=hf"])
    assert load_checkpoint("back/c.pt")["tokenizer_hash"] == right
    export.main(["peft", "--checkpoint=outa/sft_lora.pt", "--format=peft"])
    with safetensors.safe_open("peft/adapter_model.safetensors", "np") as f:
        assert f.metadata()["tokenizer_hash"] == right
    gguf = pytest.importorskip("gguf")
    export.main(["m.gguf", "--checkpoint=outa/ckpt.pt", "--format=gguf"])
    field = gguf.GGUFReader("m.gguf").fields["fable.tokenizer_hash"]
    assert bytes(field.parts[field.data[0]]).decode() == right


def test_adapters_of_another_tokenizer(here, capsys):
    run_train(sft=True, data="i.jsonl", out_dir="outa", lora_rank=2, **TEXT)
    adapters = torch.load("outa/sft_lora.pt", weights_only=True)
    assert adapters["tokenizer_hash"] == hash_of("a/tok300.model")
    save_checkpoint("lora.pt", adapters | {"tokenizer_hash": hash_of("b/tok300.model")})
    argv = ["m.bin", "--checkpoint=outa/ckpt.pt", "--merge_lora=lora.pt"]
    raises("lora.pt was made with another tokenizer", export.main, argv)
    del adapters["tokenizer_hash"]
    save_checkpoint("lora.pt", adapters)
    capsys.readouterr()
    export.main(argv)
    assert "lora.pt does not say which tokenizer" in capsys.readouterr().err


def test_run_z(here):
    """The file of run's -z must be the model's tokenizer, which the model brings or names."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source = Path(train.__file__).parent / "run.c"
    subprocess.run([compiler, "-O1", "-o", "run", source, "-lm", "-pthread"], check=True)
    for kind in "ab":
        Tokenizer(f"{kind}/tok300.model").export(f"{kind}.bin")
    export.main(["v3.bin", "--checkpoint=outa/ckpt.pt"])
    export.main(["v2.bin", "--checkpoint=outa/ckpt.pt", "--version=2"])
    export.main(["v0.bin", "--checkpoint=outa/ckpt.pt", "--version=0"])
    for path in Path("a").glob("*.model"):
        path.unlink()
    os.remove("outa/tok300.model")
    export.main(["alone.bin", "--checkpoint=outa/ckpt.pt"])  # without a tokenizer
    assert not embedded("alone.bin")

    def run(model, kind):
        words = ["./run", model, "-z", f"{kind}.bin", "-n", "5", "-t", "0"]
        done = subprocess.run(words, capture_output=True, text=True, errors="replace")
        return done.returncode, done.stderr

    for model in "v3.bin", "v2.bin", "alone.bin":
        assert run(model, "a")[0] == 0
        status, text = run(model, "b")
        assert status == 1 and text.count("\n") == 1
        assert f"b.bin is not the tokenizer that {model} was made with" in text
    assert run("v0.bin", "b")[0] == 0  # llama2.c's header has no room for it


# ----------------------------------------------------------------------------
# the hash


def field(number, value):
    """A field of a protobuf message, up to 16383 bytes: an int or bytes."""
    key = number << 3 | (0 if isinstance(value, int) else 2)
    head = bytes([key]) if key < 128 else bytes([key & 127 | 128, key >> 7])
    if isinstance(value, int):
        return head + bytes([value])
    return head + bytes([len(value) & 127 | 128, len(value) >> 7]) + value


@pytest.mark.parametrize(
    "change, same",
    [
        (field(2, field(1, b"/home/me/text")), True),  # where it was trained
        (field(2, field(16, 3)), True),  # how many threads trained it
        (field(4, field(1, field(1, b"x") + field(2, b"y"))), True),  # a test that comes with it
        (field(3, field(3, 0)), False),  # no space before the first word
        (field(3, field(4, 1)), False),  # spaces are merged
        (field(2, field(44, b"?")), False),  # how an unknown piece reads
    ],
    ids="input threads self_test dummy_prefix extra_spaces unk_surface".split(),
)
def test_what_a_sentencepiece_models_hash_depends_on(made, tmp_path, change, same):
    """A message that is appended to a protobuf message is merged with it."""
    path = tmp_path / "tok.model"
    path.write_bytes((made / "a/tok300.model").read_bytes() + change)
    assert (hash_of(path) == hash_of(made / "a/tok300.model")) == same


def test_each_piece_counts(made, tmp_path):
    """Text, score and type of a piece; a type that is spelt out is the default that is left out."""
    data = (made / "a/tok300.model").read_bytes()
    t = Tokenizer(made / "a/tok300.model")
    piece = t.sp.id_to_piece(290).encode()
    at = data.index(bytes([10, len(piece)]) + piece)
    start = at - 2
    assert data[start] == 10 and data[start + 1] == 2 + len(piece) + 5
    body = data[at : at + data[start + 1]]
    end = at + len(body)

    def changed(new):
        path = tmp_path / "tok.model"
        path.write_bytes(data[:start] + bytes([10, len(new)]) + new + data[end:])
        return hash_of(path)

    assert changed(body) == t.hash == changed(body + field(3, 1))
    other = bytes([10, len(piece)]) + piece[:-1] + b"Q" + body[2 + len(piece) :]
    hashes = {t.hash, changed(other), changed(body[:-1] + b"\x3f"), changed(body + field(3, 4))}
    assert len(hashes) == 4


def test_the_last_digits_are_the_crc_of_tok_bin(made):
    import zlib

    for kind in "ab":
        t = Tokenizer(made / kind / "tok300.model")
        assert len(t.hash) == 64 and int(t.hash[56:], 16) == zlib.crc32(t.for_llama2c())


def test_hash_of_a_tokenizer_json(tmp_path):
    """The library writes one vocabulary in several ways; BOS and EOS are part of it."""
    path = make_bpe(tmp_path / "x")
    first, config = hash_of(path), json.loads(path.read_text())
    assert config["model"]["merges"]
    model = config["model"]
    model["merges"] = [m.split(" ") if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    model.update(continuing_subword_prefix=None, byte_fallback=False)
    path.write_text(json.dumps(config, indent=3))
    assert hash_of(path) == first
    for change in (
        lambda c: c["model"]["merges"].reverse(),
        lambda c: c.update(normalizer={"type": "NFC"}),
        lambda c: c["added_tokens"][2].update(content="<|other|>"),
        lambda c: c["pre_tokenizer"]["pretokenizers"][-1].update(add_prefix_space=True),
    ):
        other = json.loads(json.dumps(config))
        change(other)
        path.write_text(json.dumps(other))
        assert hash_of(path) != first
    path.write_text(json.dumps(config))
    settings = path.parent / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token": "<|eom_id|>"}))
    assert hash_of(path) != first


# ----------------------------------------------------------------------------
# where tokenizers are


def test_a_folder_whose_tokenizers_disagree(here, capsys):
    """tokenizer.model and tokenizer.json, as in folders of Hugging Face's."""
    export.main(["hf", "--checkpoint=outa/ckpt.pt", "--format=hf"])
    assert find_tokenizer(N, "hf") == "hf/tokenizer.model"  # both are the same vocabulary
    export.main(["one/c.pt", "--hf=hf"])
    shutil.copy("b/tok300.model", "hf/tokenizer.model")
    for call in (lambda: find_tokenizer(N, "hf"), lambda: export.main(["two/c.pt", "--hf=hf"])):
        raises("hf/tokenizer.model and hf/tokenizer.json disagree", call)
    assert not os.path.exists("two/c.pt")
    shutil.copy("a/tok300.model", "hf/tok300.model")
    raises("hf/tok300.model and hf/tokenizer.model disagree", find_tokenizer, N, "hf")
    # a hash decides
    assert find_tokenizer(N, "hf", wanted=hash_of("b/tok300.model")) == "hf/tokenizer.model"
    export.main(["two/c.pt", "--hf=hf", "--tokenizer=hf/tok300.model"])
    assert hash_of("two/tok300.model") == hash_of("a/tok300.model")


def test_imports_do_not_overwrite_a_tokenizer(here, capsys):
    export.main(["hf", "--checkpoint=outa/ckpt.pt", "--format=hf"])
    (here / "models").mkdir()
    shutil.copy("b/tok300.model", "models")
    raises("models/tok300.model is another tokenizer", export.main, ["models/c.pt", "--hf=hf"])
    assert os.listdir("models") == ["tok300.model"]


def test_the_remedy_trains_no_other_vocabulary(here, capsys):
    """train_vocab makes what a model that exists was not trained with."""
    for path in "a/tok300.model", "outa/tok300.model":
        os.remove(path)
    for call in (
        lambda: sample.main(["--checkpoint=outa/ckpt.pt"]),
        lambda: instruct.main(["judge", "--checkpoint=outa/ckpt.pt", "--data=a"]),
    ):
        (here / "a/task").mkdir(exist_ok=True)
        (here / "a/task/val.jsonl").write_text('{"prompt": "Words: cat.", "response": "a cat"}')
        with pytest.raises(FileNotFoundError) as e:
            call()
        assert "train_vocab" not in str(e.value) and "outa/ckpt.pt" in str(e.value)
    raises("train_vocab --vocab_size=300.*existing model", tinystories.pretokenize, "a", N)


# ----------------------------------------------------------------------------
# shards


def test_pretokenize_again(here, capsys):
    """What changed is made again, whatever the times of the files are."""

    def times():
        for path in ("a/x.txt", "a/y.txt", "a/tok300.model"):
            os.utime(path, (1, 1))
        capsys.readouterr()
        tinystories.main(["pretokenize", "--data=a", f"--vocab_size={N}"])
        return capsys.readouterr().out

    assert "0 shards written, 2 up to date" in times()
    text = Path("a/x.txt").read_text()
    Path("a/x.txt").write_text(text.replace("cat", "dog"))
    assert "1 shards written, 1 up to date" in times()
    shutil.copy("b/tok300.model", "a/tok300.model")
    assert "2 shards written" in times()
    ids = np.fromfile("a/tok300/y.bin", "<u2")
    t, story = Tokenizer("b/tok300.model"), next(tinystories.read_stories("a/y.txt"))
    expected = t.encode(story, True, False)
    assert ids[: len(expected)].tolist() == expected
    assert tinystories.shards_tokenizer("a", N) == ("a/tok300", t.hash)


def test_interrupted_pretokenize_with_a_new_tokenizer(here, monkeypatch):
    """Shards of two vocabularies in one folder are not trained on."""
    shutil.copy("b/tok300.model", "a/tok300.model")
    real = tinystories.encode_files

    def interrupted(pool, paths, ahead):
        for result in real(pool, paths, ahead):
            if result[0] == paths[1]:
                raise KeyboardInterrupt
            yield result

    monkeypatch.setattr(tinystories, "encode_files", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tinystories.pretokenize("a", N)
    raises("a/tok300/[xy].bin .*run it again", run_train, data="a", **TINY)
    monkeypatch.undo()
    os.chdir(here)
    tinystories.pretokenize("a", N)
    assert tinystories.shards_tokenizer("a", N)[1] == hash_of("b/tok300.model")


def test_pretokenize_with_a_models_tokenizer(here, capsys):
    """Stories of one's own for a model that exists."""
    capsys.readouterr()
    tinystories.main(
        ["pretokenize", "--data_dir=b", f"--vocab_size={N}", "--tokenizer=outa/tok300.model"]
    )
    assert "all shards are replaced" in capsys.readouterr().out
    run_train(data="b", out_dir="outa", init_from="resume", **TINY | {"max_iters": 3})
    assert load_checkpoint("outa/ckpt.pt")["tokenizer_hash"] == hash_of("a/tok300.model")


def test_suffixes_of_story_files_may_be_in_capital_letters(tmp_path):
    for name, text in ("A.TXT", "one\n\ntwo"), ("b.Jsonl", '{"story": "three"}\n'):
        (tmp_path / name).write_text(text)
    files = tinystories.story_files(str(tmp_path))
    assert [[*tinystories.read_stories(path)] for path in files] == [["one", "two"], ["three"]]


def test_a_tokenizer_json_is_not_a_story_file(tmp_path):
    write_stories(tmp_path, "a")
    make_bpe(tmp_path)
    assert [Path(p).name for p in tinystories.story_files(str(tmp_path))] == ["x.txt", "y.txt"]
