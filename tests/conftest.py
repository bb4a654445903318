"""Fixtures shared by all tests: where the real model and the real stories are, if they are here.

The environment variable STORIES_DATA names a folder with stories260K/ and TinyStories_all_data/;
without it, shared/data in or beside the checkout is tried. Tests that need it skip without it.
"""

import os
import sys
from pathlib import Path

# One thread: the models here are too small to share, and tests may run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

_candidates = [os.environ.get("STORIES_DATA"), ROOT / "shared/data", ROOT.parent / "shared/data"]
DATA = next((Path(p) for p in _candidates if p and (Path(p) / "stories260K").is_dir()), None)


def data_file(name):
    if DATA is None or not (DATA / name).exists():
        pytest.skip(f"needs {name}: set STORIES_DATA to a folder that has it")
    return DATA / name


@pytest.fixture(scope="session")
def stories260k_bin():
    """The published stories260K model, a llama2.c version-0 file."""
    return data_file("stories260K/stories260K.bin")


@pytest.fixture(scope="session")
def tok512_model():
    """The SentencePiece model that stories260K was trained with."""
    return data_file("stories260K/tok512.model")


@pytest.fixture(scope="session")
def real_stories():
    """A folder of real TinyStories shards, data00.json (validation) and on."""
    return data_file("TinyStories_all_data")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
