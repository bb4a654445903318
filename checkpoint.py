"""Checkpoint files (.pt): the dictionary of llama2.c, maybe with more keys.

Written to a temporary file and renamed, read without unpickling anything but tensors and plain values.
"""

import zipfile
from dataclasses import asdict, fields
from pathlib import Path

import torch

from common import write_atomic
from model import ModelArgs, Transformer


def save_checkpoint(path, checkpoint):
    """Writes a checkpoint by write_atomic: whatever happens, `path` holds the old one or the new one.
    Raises OSError, leaving nothing behind."""
    try:
        with write_atomic(path) as f:
            torch.save(checkpoint, f)
    except (OSError, RuntimeError) as e:
        # On a full disk torch.save raises RuntimeError, "unexpected pos", over the write's OSError.
        reason = getattr(e, "strerror", None) or getattr(e.__context__, "strerror", None) or e
        raise OSError(f"{path}: cannot write the checkpoint: {reason}") from None


def load_checkpoint(path, device="cpu", mmap=False):
    """Reads a checkpoint: the llama2.c dictionary (`model`, `model_args`, ...), maybe with more keys:
    `template`, how the model was taught to chat ({"turn", "system", "next"}), `end_ids`, ids at
    which it stops besides its tokenizer's EOS, and `bos`, whether its text begins with BOS. Only tensors and plain values are unpickled. With mmap
    a tensor is read when it is used. Raises FileNotFoundError, or ValueError if the file is not such
    a checkpoint."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such checkpoint")
    try:
        mmap = mmap and zipfile.is_zipfile(path)  # PyTorch's format before 1.6 is none
        checkpoint = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except Exception as e:  # a corrupt file raises nearly anything: zip, pickle, Unicode errors
        reason = str(e).strip().split("\n")[0][:120]
        raise ValueError(f"{path} is not a readable checkpoint, or is cut short ({reason})") from None
    if not isinstance(checkpoint, dict) or not {"model", "model_args"} <= checkpoint.keys():
        raise ValueError(f"{path} is not a checkpoint: it has no 'model' and 'model_args'")
    prefix = "_orig_mod."  # left in the names by torch.compile
    checkpoint["model"] = {k.removeprefix(prefix): v for k, v in checkpoint["model"].items()}
    return checkpoint


def model_from_checkpoint(checkpoint, cls=Transformer, **overrides):
    """The model of a checkpoint, on the CPU in fp32. `overrides` replace fields of its ModelArgs;
    a class with a head that the checkpoint lacks gets a fresh one. Raises ValueError where names
    or shapes do not fit."""
    known = {f.name for f in fields(ModelArgs)}
    given = {k: v for k, v in checkpoint["model_args"].items() if k in known}
    state = checkpoint["model"]
    try:
        if "tok_embeddings.weight" in state and "output.weight" in state:
            given.setdefault("tied", torch.equal(state["tok_embeddings.weight"], state["output.weight"]))
        model = cls(ModelArgs(**{**given, **overrides}))
        missing, unexpected = model.load_state_dict(state, strict=False)
    except (TypeError, RuntimeError, AttributeError) as e:
        raise ValueError(f"the checkpoint does not fit its model_args: {e}") from None
    missing = [name for name in missing if not name.startswith("value_head")]
    if model.args.tied:
        missing = [n for n in missing if n not in ("tok_embeddings.weight", "output.weight")]
    unexpected = [name for name in unexpected if not name.startswith(("value_head", "freqs_"))]
    if missing or unexpected:
        raise ValueError(f"the checkpoint lacks {missing or 'nothing'} and has unknown {unexpected}")
    return model


def checkpoint_args(args: ModelArgs):
    """ModelArgs as the checkpoint stores them: fields that llama2.c does not know are left out
    while they have their default, so that it can load the file."""
    stored = asdict(args)
    for name, default in (("rope_theta", 10000.0), ("tied", True), ("rope_scaling", None)):
        if stored[name] == default:
            del stored[name]
    return stored
