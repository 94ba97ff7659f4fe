"""`benchmarks.gpu` on a GPU; with the peers that are processes of their own it is run on a CPU, in `tests/whole`."""

from pathlib import Path

import torch

from benchmarks.gpu.__main__ import parse, run


def test_right_and_counted(device: torch.device, tmp_path: Path) -> None:
    options = ["--device", str(device), "--tiny", "--sections", "info,parity,waits,blocks", "--out", str(tmp_path)]
    assert run(parse(options)).failures == []
    table = (tmp_path / "table.md").read_text()
    assert "llama float32, client on the CPU" in table
    assert "GB of a block 0;" not in table
