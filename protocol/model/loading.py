"""Loading a part of a model: Transformers' own loader, over a class whose construction ends by cutting."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from protocol.errors import UnsupportedModel, first_line
from protocol.model.forwards import become

LOADING = threading.RLock()
"""Held while a model is made, or PEFT's layers for one. Transformers sets PyTorch's default dtype meanwhile, and both
replace functions of PyTorch and their own; of two models made at once the later would put back what it found: what the
earlier had put there."""


def load_part(
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    state_dict: dict[str, Any],
    cut: Callable[[PreTrainedModel], object],
    *,
    dtype: torch.dtype,
    **options: Any,
) -> tuple[PreTrainedModel, list[str]]:
    """A `cls` whose `__init__` ended with `cut(model)`, loaded from lazy slices; and the keys that were missing.

    What was cut away is never read from disk. Transformers' key renames, expert fusions and on-the-fly quantization
    (`quantization_config`) apply as in `from_pretrained`.

    Raises `UnsupportedModel` for weights of other shapes than the configuration says, and for a class that cannot be
    cut.
    """

    def init(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        cut(self)

    attributes = {"__init__": init, "__module__": cls.__module__, "_keys_to_ignore_on_load_unexpected": [r".*"]}
    part: Any = type(cls.__name__, (cls,), attributes)
    try:
        with LOADING, _silence():
            model, info = part.from_pretrained(
                None, config=config, state_dict=state_dict, dtype=dtype, output_loading_info=True,
                ignore_mismatched_sizes=True, **options,
            )  # fmt: skip
    except (AttributeError, TypeError, LookupError) as error:
        raise UnsupportedModel(
            f"{cls.__name__} cannot be loaded in part ({first_line(error)}), so it cannot be served."
        ) from error
    for name, found, expected in sorted(info["mismatched_keys"])[:1]:
        raise UnsupportedModel(
            f"{name} has shape {list(found)} and the configuration says {list(expected)}; "
            "config.json and weights are of different models."
        )
    become(model, cls)
    return model, sorted(info["missing_keys"])


@contextmanager
def _silence() -> Iterator[None]:
    """Transformers says nothing meanwhile: the caller judges the missing keys."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
