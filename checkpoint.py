"""Checkpoint files (.pt): llama2.c's dictionary with optional additional keys.

A checkpoint is written to a temporary file, which is then renamed. Reading one unpickles nothing
but tensors and plain values.
"""

import itertools
import os
import re
import shutil
import struct
import sys
import zipfile
import zlib
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn

from common import write_atomic
from kernels import accelerate
from model import LARGEST, ModelArgs, Transformer


def save_checkpoint(path, checkpoint):
    """Writes a checkpoint with write_atomic: at any time, `path` holds the old or the new one.
    Raises OSError, and then leaves no temporary file behind."""
    try:
        with write_atomic(path) as f:
            torch.save(checkpoint, f)
    except (OSError, RuntimeError) as e:
        # On a full disk torch.save raises RuntimeError, "unexpected pos", over the write's OSError.
        reason = getattr(e, "strerror", None) or getattr(e.__context__, "strerror", None) or e
        raise OSError(f"{path}: cannot write the checkpoint: {reason}") from None


# Other contents of PyTorch files, recognised by a key: what to do with them
KEYS = {
    "lora": ", but adapters: give the model they were trained on, and --merge_lora to export.py",
    "model.embed_tokens.weight": ", but weights of Hugging Face: import their folder with --hf",
    "tok_embeddings.weight": ", but weights alone, as Meta's: import their folder with --meta",
}
# The sizes in model_args that every Llama checkpoint has, also one of llama2.c.
SIZES = "dim", "n_layers", "n_heads", "vocab_size"
# The types of optional keys; None is the same as a missing key.
OPTIONAL = {
    **dict.fromkeys(("config", "template", "ppo", "dpo", "reward", "lora"), dict),
    **{"iter_num": int, "bos": bool, "end_ids": list, "tokenizer_hash": str},
    "started_from": str,
}
STARTS = {  # the first bytes of a file: what it is
    b"GGUF": "a GGUF file: import it with export.py ckpt.pt --gguf=FILE",
    b"24ka": "a model.bin for run.c or llama2.c; checkpoints end in .pt",
    b"version https://git-lfs": "a pointer of Git LFS: download the file itself",
    b"\x1f\x8b": "a gzip archive",
    b"\x7fELF": "a program",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "an array of NumPy",
}


def kind_of_file(path, but=""):
    """A description, for messages, of a file that is not a checkpoint; "" if its kind is unknown or
    is the one with the suffix `but`."""
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as f:
        head = f.read(4096)
    if not head:
        return "empty"
    for start, what in STARTS.items():
        if head.startswith(start):
            return what
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size and but != ".safetensors":
        return "safetensors of Hugging Face: import their folder with export.py ckpt.pt --hf=FOLDER"
    if head[:1] == b"\n" and b"<unk>" in head[:32]:
        return "a SentencePiece tokenizer"
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as z:
                ours = any(name.endswith("data.pkl") for name in z.namelist())
            return "" if ours else "a zip archive of something else"
    except Exception:  # damage raises many kinds
        return "a damaged zip archive"
    dim, hidden, layers, heads, kv, vocab, context = struct.unpack(
        "<7i", head[:28].ljust(28, b"\0")
    )
    if (
        0 < layers <= LARGEST["n_layers"]
        and 0 < kv <= heads <= dim <= LARGEST["dim"]
        and 0 < hidden <= LARGEST["hidden_dim"]
        and 0 < abs(vocab) <= LARGEST["vocab_size"]
        and 0 < context <= LARGEST["max_seq_len"]
        and not dim % heads
    ):
        return "a llama2.c model of version 0: import it with export.py ckpt.pt --llama2c=FILE"
    text = head.decode("utf-8", "ignore").strip()
    if len(text.encode()) > len(head) - 100 and all(c.isprintable() or c.isspace() for c in text):
        kind = "a web page" if text[:1] == "<" else "JSON" if text[:1] in ("{", "[") else "a text"
        return f"{kind} that begins with {' '.join(text.split())[:30]!r}"
    return ""


def is_template(x):
    """Whether a dictionary has the keys and types of a chat template; an empty one is none."""
    texts = all(value is None or type(value) is str for value in x.values())
    return not x or bool(texts and x.get("turn")) and x.keys() <= {"turn", "system", "next"}


def verify_archive(path):
    """Raises ValueError if a checksum of an archive of torch.save, which torch.load ignores, is
    wrong."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # PyTorch can save without checksums: then all of them are 0
                if any(x.CRC for x in archive.infolist()) and archive.testzip():
                    raise zipfile.BadZipFile
    except Exception:  # damage raises many kinds: zip, zlib, operating system
        raise ValueError(f"{path} is damaged: a checksum is wrong") from None


def load_checkpoint(path, device="cpu", mmap=False, verify=True):
    """Reads a checkpoint: llama2.c's dictionary (`model`, `model_args`, ...) with optional keys,
    among them `template`, the chat template ({"turn", "system", "next"}), `end_ids`, the ids that
    end a text besides the tokenizer's EOS, and `bos`, whether text begins with BOS. Only tensors
    and plain values are unpickled. With `mmap`, a tensor is read from the file when it is used.
    Without `verify`, which reads the whole file, flipped bits are not noticed. Raises
    FileNotFoundError, or ValueError if the file is not a checkpoint, or is damaged."""
    path = Path(path)
    if path.is_dir():
        hint = ": import it with export.py ckpt.pt --hf" if (path / "config.json").exists() else ""
        raise ValueError(f"{path} is a folder, not a checkpoint{hint}")
    if not path.is_file():
        hint = "train a model first (train.py)"
        if others := sorted(p.name for p in path.parent.glob("*ckpt.pt"))[:8]:
            hint = f"{path.parent} has {', '.join(others)}"
        elif below := sorted(map(str, path.parent.glob("*/*ckpt.pt")))[:4]:
            hint = f"there is {', '.join(below)}"
        raise FileNotFoundError(f"{path}: there is no such checkpoint; {hint}")
    if verify:  # first: a damaged file is not in memory while `newest` reads the one before it
        verify_archive(path)
    try:
        mmap = mmap and zipfile.is_zipfile(path)  # files of PyTorch before 1.6 cannot be mapped
        checkpoint = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except Exception as e:  # a damaged file raises many kinds: zip, pickle, Unicode errors
        reason = str(e).strip().split("\n")[0][:120]
        if what := kind_of_file(path):
            raise ValueError(
                f"{path} is not a readable checkpoint: it seems to be {what}"
            ) from None
        if pickled := re.search(r"GLOBAL (\S+) was not", str(e)):
            reason = f"it holds {pickled[1]}: only tensors and plain values are loaded"
        elif "weights_only" in reason or "Weights only" in reason:
            reason = "it holds neither tensors nor plain values"
        raise ValueError(
            f"{path} is not a readable checkpoint, or is cut short ({reason})"
        ) from None
    if not isinstance(checkpoint, dict) or not {"model", "model_args"} <= checkpoint.keys():
        keys = checkpoint.keys() if isinstance(checkpoint, dict) else ()
        what = next((text for key, text in KEYS.items() if key in keys), "")
        raise ValueError(f"{path} is not a checkpoint: it has no 'model' and 'model_args'{what}")
    model, args = checkpoint["model"], checkpoint["model_args"]
    sizes = args if isinstance(args, dict) else {}
    other = [k for k in SIZES if type(sizes.get(k)) is not int]
    named = isinstance(model, dict) and all(isinstance(k, str) for k in model)
    if other or not named:
        what = "'model' is not a dictionary of names"
        what = f"model_args has no number {other[0]!r}" if other else what
        raise ValueError(f"{path} is not a checkpoint of a Llama: {what}")
    checkpoint = {k: v for k, v in checkpoint.items() if v is not None or k not in OPTIONAL}
    optional = {k: x for k, x in checkpoint.items() if k in OPTIONAL}
    wrong = [k for k, x in optional.items() if type(x) is not OPTIONAL[k]]
    ends = optional.get("end_ids", ())
    if not wrong and not all(type(i) is int and 0 <= i < sizes["vocab_size"] for i in ends):
        wrong = ["end_ids"]
    if not wrong and not is_template(optional.get("template", {})):
        wrong = ["template"]
    if wrong:
        value = str(optional[wrong[0]])[:40]
        raise ValueError(f"{path} is not a checkpoint of a Llama: its {wrong[0]!r} is {value}")
    if type(sizes.get("tied", True)) is not bool:
        value = str(sizes["tied"])[:40]
        raise ValueError(f"{path} is not a checkpoint of a Llama: in model_args, tied is {value}")
    for name, w in model.items():
        dense = isinstance(w, torch.Tensor) and w.layout is torch.strided and not w.is_meta
        if not dense or not w.is_floating_point():
            raise ValueError(
                f"{path} is not a checkpoint of a Llama: its {name[:60]!r} is no tensor of "
                "floating-point numbers"
            )
    prefix = "_orig_mod."  # torch.compile puts it before the names
    checkpoint["model"] = {k.removeprefix(prefix): v for k, v in checkpoint["model"].items()}
    return checkpoint


def check_generates(checkpoint, path):
    """Raises ValueError if a checkpoint is a reward model, which cannot generate text."""
    if "reward" in checkpoint:
        raise ValueError(
            f"{path} is a reward model, made by --rm: it scores text and does not write it. "
            "Give the model that it was trained from, or use it with "
            f"train.py --ppo --reward={path}"
        )


def model_from_checkpoint(checkpoint, cls=Transformer, **overrides):
    """The model of a checkpoint, on the CPU in fp32, with the fast modules of kernels.py.
    `overrides` replace fields of its ModelArgs. If `cls` has a value head and the checkpoint does
    not, the head is newly initialized. Raises ValueError if names or shapes do not fit."""
    known = {f.name for f in fields(ModelArgs)}
    stored = {k: v for k, v in checkpoint["model_args"].items() if k in known}
    state = checkpoint["model"]
    try:
        if "tok_embeddings.weight" in state and "output.weight" in state:
            stored.setdefault(
                "tied", torch.equal(state["tok_embeddings.weight"], state["output.weight"])
            )
        args = ModelArgs(**{**stored, **overrides})
        check_sizes(args, state)  # before the model is allocated
        model = cls(args)
        missing, unexpected = model.load_state_dict(state, strict=False)
    except (TypeError, RuntimeError, AttributeError) as e:
        raise ValueError(f"the checkpoint does not fit its model_args: {e}") from None
    missing = [name for name in missing if not name.startswith("value_head")]
    if model.args.tied:
        missing = [n for n in missing if n not in ("tok_embeddings.weight", "output.weight")]
    unexpected = [name for name in unexpected if not name.startswith(("value_head", "freqs_"))]
    if missing or unexpected:
        raise ValueError(
            f"the checkpoint lacks {missing or 'nothing'} and has unknown {unexpected}"
        )
    return accelerate(model)


def check_sizes(args, state):
    """Raises ValueError if the shapes in a state dict are not those of its ModelArgs."""
    layers = {name.split(".")[1] for name in state if name.startswith("layers.")}
    if len(layers) != args.n_layers:
        raise ValueError(f"model_args say n_layers={args.n_layers}, the weights have {len(layers)}")
    for name, shape in (
        ("tok_embeddings.weight", (args.vocab_size, args.dim)),
        ("output.weight", (args.vocab_size, args.dim)),
        ("layers.0.attention.wq.weight", (args.n_heads * args.head_dim, args.dim)),
        ("layers.0.feed_forward.w1.weight", (args.ffn_dim, args.dim)),
    ):
        if name in state and tuple(state[name].shape) != shape:
            raise ValueError(
                f"the checkpoint does not fit its model_args: {name} has the shape "
                f"{tuple(state[name].shape)}, not {shape}"
            )


def checkpoint_args(args: ModelArgs):
    """ModelArgs as the checkpoint stores them. Fields that llama2.c does not know are left out if
    they have their default value, so that llama2.c can load the file."""
    stored = asdict(args)
    usual = dict(rope_theta=10000.0, tied=True, rope_scaling=None)
    for name, default in {**usual, "head_dim": args.dim / args.n_heads}.items():
        if stored[name] == default:
            del stored[name]
    return stored


def halve_frozen(models, dtype):
    """Keeps the frozen weights of linear layers in `dtype`, which autocast would convert at every
    forward pass, and their fp32 values in CPU memory, as `master` of the layer. The results under
    autocast in `dtype` are the same to the bit, and state_dict has the fp32 values. `models` may
    share weights. A weight that is an embedding too is left in fp32, and so is a value head, which
    computes in fp32. Must be called after add_lora. Does nothing if dtype is fp32."""
    masters = {}  # by weight
    for model in models if dtype is not torch.float32 else ():
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None) if isinstance(module, nn.Linear) else None
            in_fp32 = id(weight) in embeddings or name == "value_head"
            if weight is None or weight.requires_grad or in_fp32:
                continue
            if weight not in masters:
                masters[weight] = weight.data.cpu()
                weight.data = weight.data.to(dtype)
            module.master = masters[weight]
            module.register_state_dict_post_hook(give_master)
            module.register_load_state_dict_pre_hook(take_master)


def give_master(module, state, prefix, metadata):
    state[f"{prefix}weight"] = module.master


def take_master(module, state, prefix, *_):
    if f"{prefix}weight" in state:
        module.master.copy_(state[f"{prefix}weight"].detach())


def choose_device(name=""):
    """The device that --device names, or the best available one. Raises ValueError if this machine
    does not have it."""
    counts = {
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
        "cpu": 1,
    }
    name = name or next(kind for kind, n in counts.items() if n)
    kind, _, number = name.partition(":")
    if kind not in counts or not (number or "0").isdigit():
        raise ValueError(f"--device={name}: expected cpu, cuda, cuda:N or mps")
    if int(number or 0) >= counts[kind]:
        raise ValueError(f"--device={name}: there is no such device here; use --device=cpu")
    return name


# ----------------------------------------------------------------------------
# the checkpoints of a run


def link(old, new):
    """Makes `new` another name of the file `old`, replacing what was there in one step."""
    temporary = new.with_suffix(".link")
    temporary.unlink(missing_ok=True)
    try:
        os.link(old, temporary)
    except OSError:  # a file system without hard links
        with open(old, "rb") as source, write_atomic(temporary) as f:
            shutil.copyfileobj(source, f)
    os.replace(temporary, new)


def has_begun(path):
    """Whether a stage has saved its checkpoint at path, also if `newest` has renamed it since."""
    before, damaged = path.with_suffix(".prev.pt"), path.with_suffix(".damaged.pt")
    return path.exists() or before.exists() and damaged.exists()


def newest(path, rename=True):
    """The checkpoint at path or, if it is damaged, the one before it, with a warning. The damaged
    file is renamed: the next save would otherwise keep it as the one before."""
    try:
        return load_checkpoint(path)
    except (ValueError, FileNotFoundError) as e:
        previous = path.with_suffix(".prev.pt")
        if not previous.exists():
            raise
        print(f"warning: {e}; continuing from {previous}", file=sys.stderr)
        state = load_checkpoint(previous)
        if rename:
            with suppress(FileNotFoundError):
                os.replace(path, path.with_suffix(".damaged.pt"))
        return state


def another_stage(state):
    """Whether a checkpoint was written by a stage after pretraining."""
    written_by = state.get("config") or {}
    return any(k in state for k in ("ppo", "dpo", "reward")) or bool(written_by.get("sft"))


def weights_alone(state):
    """What a new run takes from a checkpoint: all but the state of the run that wrote it, so that
    the reference of the new run is the checkpoint's model."""
    of_a_run = {
        *("position", "tokens", "bad_steps", "optimizer", "optimizers", "scaler"),
        *("ppo", "dpo", "reward", "unmerged", "lora"),
    }
    return {k: v for k, v in state.items() if k not in of_a_run}


def recorded_start(state):
    """The file that the run of a checkpoint started from, as it was named; "" if it is unknown."""
    init_from = (state.get("config") or {}).get("init_from", "")
    return state.get("started_from") or ("" if init_from in ("scratch", "resume") else init_from)


def weights_id(state):
    """A checksum of the weights of a checkpoint, from the first 1,024 numbers of each tensor."""
    checksum = 0
    for name in sorted(state["model"]):
        part = state["model"][name].flatten()[:1024].float().numpy()
        checksum = zlib.crc32(part.tobytes(), checksum)
    return checksum


def start_has_changed(state, path):
    """Whether the checkpoint that the run of `state`, in the file `path`, started from has other
    weights now. False if it is not known, or not there."""
    start, mine = state.get("started_from", ""), state.get("started_id")
    if mine is None or not Path(start).is_file() or Path(start).absolute() == Path(path).absolute():
        return False
    try:
        return weights_id(load_checkpoint(start, mmap=True, verify=False)) != mine
    except (OSError, ValueError):
        return False


def start_of_a_new_run(stage, pretrained, state):
    """The checkpoint file that a new run of a stage after pretraining starts from, with
    --init_from=resume. `pretrained` is out_dir/ckpt.pt; `state` is the stage's own checkpoint,
    which the run cannot continue, or None if there is none. Raises ValueError if the folder leaves
    open which file it is."""
    mine = pretrained.with_name(f"{stage.prefix}ckpt.pt")
    if start := recorded_start(state or {}):
        usual = Path(state.get("config", {}).get("out_dir", "")) / pretrained.name
        start = pretrained if Path(start) == usual else Path(start)
        if start.absolute() != mine.absolute():
            return start
        why = f"the run of {mine} started from an earlier file of this name"
    else:
        names = [f"{prefix}ckpt.pt" for prefix in ("sft_", "dpo_", "ppo_")]
        others = [pretrained.with_name(n) for n in names if n != mine.name]
        begun = [str(path) for path in others if has_begun(path)]
        if not begun:
            return pretrained
        why = "there is no such checkpoint" if state is None else "its start is unknown"
        why = f"{mine}: {why}, and the folder has {' and '.join(begun)}"
    raise ValueError(
        f"{why}: name the model that the run starts from, such as --init_from={pretrained}"
    )


def starting_point(run, stage, differences):
    """The checkpoint that the run starts from, or None; and whether the run continues the one that
    wrote it. differences(run, checkpoint) are the flags that make it another run, as text. The
    checkpoint of a new run names its file, as `started_from`."""
    args = run.args
    pretrained = Path(args.out_dir) / "ckpt.pt"
    mine = pretrained.with_name(f"{stage.prefix}ckpt.pt")
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and has_begun(mine):
        state = newest(mine)  # torchrun --max-restarts has started this very run again
        if state.get("run_id") == os.environ.get("TORCHELASTIC_RUN_ID"):
            return state, True
    if args.eval_only and stage.evaluates_its_checkpoint:
        return newest(mine, rename=False), True

    def weights_of(state, path):
        if stage.writes_text:  # a reward model can start a reward model alone
            check_generates(state, path)
        samples = state.get("reward", {}).get("samples")  # which a reward model cannot write anew
        reward = {"reward": {"samples": samples}} if samples else {}
        start = {"started_from": str(path), "started_id": weights_id(state)}
        return weights_alone(state) | reward | start

    uncounted = {"iter_num": 0, "best_val_loss": 1e9}
    init_from = args.init_from
    # Without the flag, --eval_only evaluates what the stage has trained, not where it would start.
    if args.eval_only and "init_from" not in args.given and has_begun(mine):
        init_from = "resume"
    if init_from not in ("scratch", "resume"):
        return weights_of(load_checkpoint(init_from), init_from) | uncounted, False
    implied = init_from == "scratch" and "init_from" not in args.given
    if args.eval_only and implied and stage.from_scratch:
        load_checkpoint(mine)  # raises an error that names the checkpoints that there are
    state = None
    if init_from == "resume" and (has_begun(mine) or stage.from_scratch):
        state = newest(mine, rename=not args.eval_only)
        if stage.from_scratch and another_stage(state):
            return weights_of(state, mine), True
        changed = differences(run, state) if stage.resumes_same_flags_only else ""
        if not changed:
            return state, True
        if run.rank == 0:
            print(f"the run in {args.out_dir} had other flags ({changed}): a new one starts")
    if stage.from_scratch:
        return None, False
    path = start_of_a_new_run(stage, pretrained, state) if init_from == "resume" else pretrained
    own = path == pretrained
    state = weights_of(newest(path) if own else load_checkpoint(path), path)
    return state if stage.continues_count and own else state | uncounted, False


def move_aside(path, rank):
    """Renames the checkpoints of an earlier run, where a new run would write its own: the newest,
    the one before it and the best. Otherwise a new run that is killed before its first save would
    resume the earlier one. The log and the report of a run with checkpoints are kept with them."""
    best, log, report = (
        path.with_name(path.name.replace("ckpt.pt", name))
        for name in ("best.pt", "log.jsonl", "report.json")
    )
    files = [f for f in (path, path.with_suffix(".prev.pt"), best) if f.exists()]
    files += [f for f in (log, report) if files and f.exists()]
    if dist.is_initialized():
        dist.barrier()  # all have looked
    if rank == 0 and not files:
        report.unlink(missing_ok=True)  # of a run whose checkpoints have been removed
    for file, replaced in zip(files, replaced_names(files)) if rank == 0 else ():
        os.replace(file, replaced)
        print(f"{file} of an earlier run is now {replaced}")


def replaced_names(files):
    """New names for files that would be overwritten: ckpt.pt becomes ckpt.replaced.pt, or
    ckpt.replaced2.pt if one of the files cannot have the first name because it exists."""
    for k in itertools.count(1):
        names = [f.with_suffix(f".replaced{k if k > 1 else ''}{f.suffix}") for f in files]
        if not any(name.exists() for name in names):
            return names
