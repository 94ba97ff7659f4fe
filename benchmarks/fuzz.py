"""Coverage-guided fuzzing of what reads strangers' bytes; tests/whole/test_fuzz.py is its short form. Needs `.[fuzz]`:

python -m benchmarks.fuzz --inputs 1000000                       (all targets, one process after the other)
python -m benchmarks.fuzz --inputs 100000 --target handlers --seed 1

Atheris (libFuzzer) mutates the decisions of `tests.tools.fuzzing.choices` and keeps those that reach new code. A crash,
a wrong answer, anything left behind, an input over 5 s, or memory beyond the bounds ends the run with the input.
"""

import argparse
import logging
import os
import subprocess
import sys
import time
import warnings

from protocol.name import cache_folder

SHARES = {"handlers": 0.1, "frames": 0.35, "introductions": 0.05, "records": 0.3, "seal": 0.2}
"""Of the inputs; a handler's take the most time by far."""
MAX_GROWTH = 64
"""MiB for 100,000 inputs, after the first tenth."""
_CHECK_EVERY = 2000
_FOLDER = cache_folder() / "benchmarks"


def fuzz(name: str, inputs: int, seed: int) -> None:
    """Fuzz one target until it has had `inputs`. Does not return: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["protocol", "bootstrap", "peer"]):
        from tests.tools.fuzzing.targets import bounded_memory, build_target, resident
    import torch

    torch.set_num_threads(1)
    logging.getLogger("peer").propagate = False  # the target looks at what a peer logs
    target = build_target(name, _FOLDER)
    began = time.perf_counter()
    start: list[int] = []
    slowest = next_check = 0.0

    def try_one(data: bytes) -> None:
        nonlocal slowest, next_check
        if target.inputs >= inputs:
            report()
            target.close()
            os._exit(0)  # libFuzzer takes any other end for a crash
        before = time.perf_counter()
        target.play(data)
        slowest = max(slowest, time.perf_counter() - before)
        assert slowest < 5, f"{slowest:.1f} s for one input"
        if target.inputs >= next_check:
            next_check = target.inputs + _CHECK_EVERY
            target.check()
            if not start and target.inputs >= inputs / 10:
                start.append(resident())

    def report() -> None:
        target.check()
        grown = resident() - start[0]
        assert grown <= max(1.0, inputs / 100_000) * MAX_GROWTH, f"memory grew by {grown} MiB"
        seconds = time.perf_counter() - began
        print(f"{name}: {target.inputs} inputs, {seconds:.0f} s, slowest {slowest:.2f} s, memory grew by {grown} MiB",
              vars(target).get("answers", ""), flush=True)  # fmt: skip

    corpus = _FOLDER / "corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    options = [
        f"-seed={seed + 1}",
        "-max_len=300",
        "-len_control=0",
        "-timeout=30",
        "-rss_limit_mb=0",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={_FOLDER}/{name}-", str(corpus)], try_one)
    with bounded_memory():
        atheris.Fuzz()


def main() -> None:
    """Run the targets asked for, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.partition(";")[0])
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--target", choices=[*SHARES, "all"], default="all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.target != "all":
        fuzz(options.target, options.inputs, options.seed)
    for name, share in SHARES.items():
        command = [sys.executable, "-m", "benchmarks.fuzz", "--target", name, "--seed", str(options.seed)]
        subprocess.run([*command, "--inputs", str(round(options.inputs * share))], check=True)


if __name__ == "__main__":
    main()
