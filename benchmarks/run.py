"""The figures of RESULTS.md that are ratios or sizes, one program after the other: `python -m benchmarks.run`.

Takes about an hour on two quiet cores. The long runs (chaos, soak, fuzz, finetune) and the one
on a GPU (gpu) are programs of their own.
"""

import argparse
import subprocess
import sys
import time
from itertools import product

_MODELS = ("llama", "smollm2")
_RUNS: list[list[str]] = [
    *(["core", "--model", model, "--peers", "2"] for model in ("llama", "bloom", "smollm2")),
    ["core", "--model", "llama-bf16", "--peers", "2", "--prompts", "512"],  # longer ones take minutes each
    *(["core", "--model", model, "--peers", "2", "--prompts", "--compile"] for model in ("llama-bf16", "smollm2")),
    ["step_time"],
    ["trace"],
    *(["training", "--model", model, "--peers", str(peers)] for model, peers in product(_MODELS, (1, 2, 3))),
    *(["many", "--model", model, "--peers", "1"] for model in _MODELS),
    ["many", "--peers", "2", "--peer-threads", "1"],
    ["gateway", "--model", "llama", "--peers", "1"],
    ["methods"],
    ["stall"],
    ["carriers"],
    ["codecs"],
    ["latency"],
    ["capacity"],
    ["start"],
]


def main() -> None:
    """Run them and let each print its table; ends with 1 when any failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=sorted({run[0] for run in _RUNS}), help="one kind of figure")
    options = parser.parse_args()
    failed = []
    for run in _RUNS:
        if options.only not in (None, run[0]):
            continue
        command = ["-m", f"benchmarks.{run[0]}", *run[1:]]
        begin = time.monotonic()
        print(f"\n`python {' '.join(command)}`\n", flush=True)
        if subprocess.run([sys.executable, *command], check=False).returncode:
            failed.append(" ".join(command))
        print(f"\n({time.monotonic() - begin:.0f} s)", flush=True)
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
