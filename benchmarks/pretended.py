"""Every test family on the pretended GPU (`tests.tools.pretended_gpu`) against the CPU, and what is asked of that GPU.

`python -m benchmarks.pretended [FAMILY ...]`: a row each of a table in markdown. Steps are sessions' with all cache
edits, one by one and joined; training is forward and backward, kept, joined and block by block. Errors are relative to
the largest value: equal but for rounding is what is expected. Operations and waits are those of one decode step of five
blocks, by Transformers alone, of one session, and of eight in one pass. Ends with exit code 1 where something failed.
"""

import tests.tools.pretended_gpu as pretended_gpu  # isort: skip  before torch

import argparse
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils import logging

from peer.span.loading import load_span
from peer.start.trial import tolerance
from protocol.errors import first_line
from protocol.model.checkpoint import open_checkpoint
from protocol.model.split_linear import split_linears
from tests.tools.device_counts import DecodeSteps, count_transformers
from tests.tools.device_parity import differences, run_all
from tests.tools.families import EXTRA_FAMILIES, FAMILIES, MULTIMODAL_FAMILIES, build_family
from tests.tools.spans import END, START

_DEVICE = torch.device("cuda:0")
_COLUMNS = (
    "family", "weights", "joined by", "blocks in the arena", "steps", "joined steps", "forward", "backward",
    "operations", "waits",
)  # fmt: skip


@dataclass(frozen=True)
class _Case:
    family: str
    dtype: torch.dtype = torch.float32
    quantization: str = "none"

    @property
    def weights(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return dtype if self.quantization == "none" else f"{self.quantization}, {dtype}"


_CASES = (
    *map(_Case, (*FAMILIES, *EXTRA_FAMILIES, *MULTIMODAL_FAMILIES)),
    _Case("llama", torch.bfloat16),
    *(_Case("llama", torch.bfloat16, quantization) for quantization in ("nf4", "int8")),
    _Case("bloom", torch.bfloat16, "nf4"),
)


def _compare(case: _Case, path: Path) -> tuple[list[str], bool]:
    """The cells of its row after the first two, and whether all is as expected."""
    found = []
    for where in (str(_DEVICE), "cpu"):
        checkpoint = open_checkpoint(str(path))
        span = load_span(checkpoint, START, END, dtype=case.dtype, device=where, quantization=case.quantization)
        split_linears(span.model)
        found.append(run_all(span))
    (ours, way), (theirs, expected) = found
    errors = differences(ours, theirs)
    backward = max(errors[name] for name in ("backward", "joined training", "block by block"))
    cells = [errors["steps"], errors.get("joined steps"), errors["forward"], backward]
    is_right = way == expected and max(errors.values()) <= tolerance(span)
    return [way.joiner, f"{way.arena} of {END - START}", *map(_error, cells)], is_right


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}" if value else "0"


def _counts(case: _Case, path: Path) -> list[str]:
    if case.family in MULTIMODAL_FAMILIES or case.dtype != torch.float32:
        return ["", ""]
    gpu = pretended_gpu.device
    steps = DecodeSteps(path, _DEVICE, gpu)
    each = count_transformers(path, _DEVICE, gpu), steps.count(steps.open(1)), steps.count(steps.open(8))
    waits = (str(sum(counts.waits.values())) for counts in each)
    return [", ".join(str(counts.operations) for counts in each), ", ".join(waits)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="of tests.tools.families; default: all")
    names = parser.parse_args().families
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("|", " | ".join(_COLUMNS), "|")
    print("|---" * len(_COLUMNS) + "|")
    has_failed = False
    with tempfile.TemporaryDirectory() as folder:
        for case in _CASES:
            if names and case.family not in names:
                continue
            try:
                path = build_family(case.family, Path(folder))
                cells, is_right = _compare(case, path)
                cells += _counts(case, path)
            except Exception as error:  # any failure at all is a row
                cells, is_right = [f"failed: {first_line(error)}"], False
            print("|", " | ".join([case.family, case.weights, *cells]), "|" if is_right else "| wrong", flush=True)
            has_failed |= not is_right
    sys.exit(has_failed)


if __name__ == "__main__":
    main()
