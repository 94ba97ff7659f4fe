"""Small products, whole and split over threads: milliseconds, and the numbers of rows that keep their bits.

python -m benchmarks.split --threads 2
"""

import argparse
import itertools

import torch
from torch import nn

from protocol.machine.timing import fastest
from protocol.model.split_linear import SplitLinear, split_linears

_SHAPES = ((1024, 1024), (2816, 1024), (1024, 2816), (576, 576), (1536, 576), (49152, 576), (32000, 1024))
"""(out, in): a llama's and SmolLM2's layers and heads."""
_ROWS = (1, 4, 8)
_CACHE = 512 * 2**20
"""Bytes of layers taken in turn, so that none stays in a cache."""


@torch.no_grad()
def seconds(layers: list[nn.Linear], rows: int) -> float:
    """Of a product of so many rows."""
    turn = itertools.cycle(layers)
    input = torch.randn(1, rows, layers[0].in_features)
    return fastest(lambda: next(turn)(input))


def main() -> None:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"| weight | rows | whole, ms | over {options.threads} threads, ms | rows with equal bits |")
    print("|---" * 5 + "|")
    for out_features, in_features in _SHAPES:
        count = max(2, _CACHE // (4 * out_features * in_features))
        layers = [nn.Linear(in_features, out_features, bias=False) for _ in range(count)]
        whole = [seconds(layers, rows) for rows in _ROWS]
        model = nn.Sequential(*layers)
        split_linears(model)
        splits = sorted(layers[0].splits) if isinstance(layers[0], SplitLinear) else []
        for rows, before in zip(_ROWS, whole, strict=True):
            after = f"{1e3 * seconds(layers, rows):.2f}" if rows in splits else "not split"
            print(f"| {out_features:,} x {in_features:,} | {rows} | {1e3 * before:.2f} | {after} | {splits} |")


if __name__ == "__main__":
    main()
