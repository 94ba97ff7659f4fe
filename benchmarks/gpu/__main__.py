"""What a GPU does with the product: right, how fast, what was left off; one Markdown table.

    python -m benchmarks.gpu                                  all of it, on cuda:0
    python -m benchmarks.gpu --sections speed --budget 300    a part, of which nothing begins after 300 s
    python -m benchmarks.gpu --device cpu --tiny              whether the program itself works, on any machine

Every figure is printed when it is known, and results.json and table.md in --out are written anew after each.
"""

import argparse
import faulthandler
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import transformers

from benchmarks.gpu import blocks, info, parity, speed, waits
from benchmarks.gpu.gpu import Gpu
from benchmarks.gpu.report import Report
from protocol.errors import BadUsage

_SECTIONS: dict[str, Callable[[Report, Gpu, Path, bool], None]] = {
    "info": lambda report, gpu, _, tiny: info.run(report, gpu, tiny),
    "parity": parity.run,
    "waits": waits.run,
    "blocks": lambda report, gpu, _, tiny: blocks.run(report, gpu, tiny),
    "speed": speed.run,
}
_SHARED = Path("/dev/shm")
_ROOM = 20e9
"""Bytes that the 7B llama's files take, and some more."""
_STUCK = 120.0
"""Seconds after the budget's end when every thread's stack is printed, as something must hang."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of `arguments`, or of the command line. Ends the program where they cannot be right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--sections", default=",".join(_SECTIONS), help="default: all, in this order")
    parser.add_argument("--budget", type=float, default=1800, metavar="SECONDS", help="begin nothing after that")
    parser.add_argument("--tiny", action="store_true", help="small sizes: figures mean nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="a folder for results.json and table.md")
    options = parser.parse_args(arguments)
    options.sections = options.sections.split(",")
    if unknown := set(options.sections) - set(_SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(_SECTIONS)}")
    return options


def run(options: argparse.Namespace) -> Report:
    """The sections that were chosen, one after the other. Raises `BadUsage` where the device does not work."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    gpu, tiny = Gpu(options.device), options.tiny
    report = Report(options.out, f"`python -m benchmarks.gpu` on `{gpu.name}`, {date.today()}:", options.budget)
    in_memory = _SHARED.is_dir() and shutil.disk_usage(_SHARED).free > _ROOM
    with tempfile.TemporaryDirectory(dir=_SHARED if in_memory else None) as folder:
        for name in options.sections:
            _SECTIONS[name](report, gpu, Path(folder), tiny)
    return report


def main() -> int:
    """Print the table; 1 if anything failed, 2 if there is no such device."""
    options = parse()
    faulthandler.dump_traceback_later(options.budget + _STUCK)
    try:
        report = run(options)
    except BadUsage as error:
        print(error, file=sys.stderr)
        return 2
    print(f"\n{report.table()}", flush=True)
    for failure in report.failures:
        print(f"FAILED {failure}")
    return bool(report.failures)


if __name__ == "__main__":
    sys.exit(main())
