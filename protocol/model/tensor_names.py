"""Which of a checkpoint's tensors belong to which block."""

import re
from collections.abc import Iterable

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from protocol.model.anatomy import BlockList


def blocks_of(names: Iterable[str], model: PreTrainedModel, where: BlockList) -> dict[str, int]:
    """Tensor name -> block, for those of a checkpoint's tensors `names` that belong to one.

    A checkpoint may call the blocks otherwise than `model` (on any device) does, and have other blocks, such as those
    of a part that sees: what is whose is told by the renames with which Transformers loads it.
    """
    stems = "|".join(map(re.escape, _stems(names, model, where))) or "(?!)"
    numbered = re.compile(rf"(?:{stems})(\d+)\.")
    return {name: int(block[1]) for name in names if (block := numbered.match(name))}


def _stems(names: Iterable[str], model: PreTrainedModel, where: BlockList) -> list[str]:
    """With what the names of the blocks' tensors begin, up to the block's number; mostly one such stem."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    in_blocks, stems = re.compile(rf"{re.escape(where.path)}\.(\d+)\."), list[str]()
    for name in names:
        if name.startswith(tuple(stems)):
            continue
        ours = in_blocks.match(rename_source_key(name, renamings, converters, prefix, state)[0])
        if ours and (stem := re.match(rf"(.*?\.)??(?={ours[1]}\.)", name)):
            stems.append(stem[0])
    return stems
