"""bench/gpu.sh cannot be tried on a GPU here: every section runs on the CPU, with tiny shapes."""

import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import gpu  # noqa: E402

import pretraining  # noqa: E402

PEER = """
import sys
flags = dict(word.removeprefix("--").split("=") for word in sys.argv[1:])
open(f"data/tok{flags['vocab_size']}/data01.bin", "rb").read(1)
for i in range(int(flags["max_iters"])):
    print(f"{i} | loss 6.0000 | lr 5.000000e-07 | {90.0 if i < 4 else 4.0}ms | mfu 1.00%")
"""


@pytest.mark.parametrize("section", ["pretraining", "ppo", "rollouts", "lora"])
def test_sections(section, tmp_path, capsys, monkeypatch):
    """With the row that each prints; llama2.c's time is the median of the second half."""
    monkeypatch.setattr(pretraining, "peak_matmul_flops", lambda *_: 1e12)
    (tmp_path / "train.py").write_text(PEER)
    gpu.main([section, "--quick", "--device=cpu", f"--llama2c={tmp_path}"])
    (row,) = capsys.readouterr().out.splitlines()
    says = {"pretraining": "tokens/s, MFU", "ppo": " update ", "rollouts": "rollouts/s"}
    assert says.get(section, " ms, ") in row
    if section == "pretraining":
        assert f"llama2.c {64 / 4e-3:,.0f} tokens/s, ratio" in row


def test_the_script_runs_every_section():
    script = ROOT / "bench" / "gpu.sh"
    text = script.read_text()
    assert all(f"section {name}" in text for name in gpu.SECTIONS)
    assert all(shape in text for shape in gpu.SHAPES)
    done = subprocess.run(["sh", script, "--fast"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("usage: ")
