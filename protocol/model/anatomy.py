"""Where a Transformers model keeps its blocks."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from protocol.errors import UnsupportedModel

if TYPE_CHECKING:  # reading a configuration does not take the half of Transformers that models take
    from transformers import PreTrainedConfig, PreTrainedModel


def num_blocks(config: "PreTrainedConfig") -> int:
    """How many transformer blocks a model of this configuration has."""
    return int(config.get_text_config().num_hidden_layers)


def hidden_size(config: "PreTrainedConfig") -> int:
    """The width of the hidden states between blocks."""
    return int(config.get_text_config().hidden_size)


def context_length(config: "PreTrainedConfig") -> int | None:
    """How many tokens a model of this configuration reads; `None` where its position encoding sets no limit."""
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len"))  # the latter is MPT's
    return next((length for length in found if isinstance(length, int)), None)


@dataclass(frozen=True)
class BlockList:
    """The block list of a model class, as dotted paths from the model: `path` = `trunk` + `.` + `attribute`."""

    trunk: str
    """The module whose forward runs the blocks, `model` or `transformer`; empty: the model itself."""
    attribute: str

    @property
    def path(self) -> str:
        """The block list's own path, `model.layers`."""
        return f"{self.trunk}.{self.attribute}" if self.trunk else self.attribute

    def trunk_of(self, model: nn.Module) -> nn.Module:
        """The module of `model` whose forward runs the blocks."""
        return model.get_submodule(self.trunk)

    def around(self, model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        """What the trunk is a part of, from `model` down: each module, and the name of its child that leads there."""
        names = self.trunk.split(".") if self.trunk else []
        for depth, child in enumerate(names):
            yield model.get_submodule(".".join(names[:depth])), child

    def of(self, model: nn.Module) -> nn.ModuleList:
        """The block list of `model`."""
        return model.get_submodule(self.path)  # type: ignore[return-value]


def find_form(block: Any, run: Callable[[], Any], is_right: Callable[[Any], bool]) -> bool:
    """Whether a trunk runs over blocks that only pass hidden states on; sets what these must return.

    `run` returns the trunk's last hidden states with `block` in the place of its blocks. `block.returns_tuple` becomes
    the form (hidden states, or a tuple that begins with them) in which the trunk expects them: no architecture says so.
    """
    for returns_tuple in (False, True):
        block.returns_tuple = returns_tuple
        try:
            output = run()
        except Exception:  # any failure at all: this form is not it
            continue
        if is_right(output):
            return True
    return False


def configurations(model: "PreTrainedModel") -> "list[PreTrainedConfig]":
    """Those of `model` and of its parts, each once, from the whole down: parts may have copies of their own."""
    found = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return list(found.values())  # type: ignore[arg-type]


def has_other_parts(config: "PreTrainedConfig") -> bool:
    """Whether a model of this configuration is a language model and more: a part that sees or hears."""
    return config.get_text_config() is not config


def find_blocks(model: "PreTrainedModel") -> BlockList:
    """The `ModuleList` as long as the configuration says whose items' class must not be split over devices.

    Of a model with other parts the language model's, which is the one with the language model's configuration.
    Raises `UnsupportedModel` when there is none (encoder-decoder, or blocks of a kind of their own).
    """
    count = num_blocks(model.config)
    unsplittable = set(model._no_split_modules or [])
    text = type(model.config.get_text_config())
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) != count:
            continue
        blocks = BlockList(*path.rpartition(".")[::2])
        if has_other_parts(model.config) and not isinstance(getattr(blocks.trunk_of(model), "config", None), text):
            continue
        if not unsplittable or type(module[0]).__name__ in unsplittable:
            return blocks
    raise UnsupportedModel(
        f"{type(model).__name__} has no list of {count} like blocks, so it cannot be served in spans; "
        "expected a decoder-only model such as BLOOM, Llama or Mistral."
    )
