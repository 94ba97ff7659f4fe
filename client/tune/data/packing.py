"""Several short sequences in one row, kept apart by position ids that begin again at 0."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from client.tune.data.encode import Example
from client.tune.errors import ConfigError

BatchRow = list[Example]


def pack(examples: Sequence[Example], max_length: int) -> list[BatchRow]:
    """The examples in rows of at most `max_length` tokens. Deterministic.

    Best-fit decreasing: longest first, each into the fullest row that still takes it; at most 11/9 of the fewest rows
    possible, plus 4 (D. S. Johnson, 1974).
    """
    rows: list[BatchRow] = []
    spaces: list[tuple[int, int]] = []  # (free tokens, index of the row), sorted
    for example in sorted(examples, key=len, reverse=True):
        place = bisect_left(spaces, (len(example), 0))
        if place < len(spaces):
            space, index = spaces.pop(place)
            rows[index].append(example)
        else:
            space, index = max_length, len(rows)
            rows.append([example])
        insort(spaces, (space - len(example), index))
    return rows


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Makes sure that `model` keeps packed sequences apart: what one says may not depend on its neighbour in the row.

    Two sequences run apart, packed, and (for the size of the error) run together as one. Costs four short forwards.

    Raises:
        ConfigError: the model's family takes no position ids, or mixes the sequences (bloom and mpt do: alibi).
    """
    first = torch.arange(1, 8, device=model.device)[None]
    second = torch.arange(8, 18, device=model.device)[None]
    training = model.training
    model.eval()
    try:
        apart = torch.cat([_logits(model, part, torch.arange(part.shape[1])) for part in (first, second)], dim=1)
        row = torch.cat([first, second], dim=1)
        restarting = torch.cat([torch.arange(first.shape[1]), torch.arange(second.shape[1])])
        packed, joined = _logits(model, row, restarting), _logits(model, row, torch.arange(row.shape[1]))
    except TypeError as error:
        raise ConfigError(f"data.packing: {type(model).__name__} takes no position ids; switch packing off") from error
    finally:
        model.train(training)
    if (packed - apart).abs().max() > 0.1 * (joined - apart).abs().max():
        raise ConfigError(f"data.packing: {type(model).__name__} mixes the records of a row; switch packing off")


def _logits(model: PreTrainedModel, ids: Tensor, positions: Tensor) -> Tensor:
    output = model(input_ids=ids, position_ids=positions[None].to(ids.device), use_cache=False)
    logits: Tensor = output.logits
    return logits.float()
