"""The shape of the source: what can be checked mechanically of how the project is laid out."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {path.stem: path for path in ROOT.glob("*.py")}
SOURCES = [
    *MODULES.values(),
    *(
        path
        for folder in ("bench", "experiments", "tests")
        for path in (ROOT / folder).glob("*.py")
    ),
    *ROOT.glob("*.c"),
]


def test_number_of_top_level_files():
    assert len(MODULES) <= 18


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_line_is_longer_than_100_columns(path):
    lines = re.sub("  # noqa.*", "", path.read_text(encoding="utf-8")).splitlines()
    assert [i for i, line in enumerate(lines, 1) if len(line) > 100] == []


def test_format_and_lint():
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent)) or shutil.which("ruff")
    if ruff is None:
        pytest.skip("needs ruff: pip install -r tests/requirements.txt")
    for command in ("format", "--check"), ("check",):
        done = subprocess.run([ruff, *command, "."], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
