"""What a gateway serves by name: the model itself, and PEFT adapters on it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from client.gateway.engine.grammar import Grammars
from client.gateway.engine.text import Pieces
from client.model.crossing import to_host_memory
from client.model.handle import swarm_of
from client.requests.work import Work
from client.tokenizer import load_adapted_tokenizer, vocabulary_size
from protocol.errors import BadUsage, first_line

if TYPE_CHECKING:  # it takes seconds to import
    from peft import PeftModel


@dataclass(eq=False)
class Served:
    """The model, or the model with an adapter, under a name."""

    name: str
    root: str
    """The folder or hub name that it was loaded from."""
    work: Work
    tokenizer: Any
    vocabulary: int
    """Rows of the model's table of embeddings."""
    ends: tuple[int, ...]
    """The tokens with which a text ends."""
    parent: str | None = None
    alias: str = ""
    """PEFT's name of the adapter; empty: there is none."""
    is_outside: bool = False
    """Whether the adapter changes anything outside of the blocks: the embeddings, the head."""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.pieces = Pieces(self.tokenizer)

    @cached_property
    def grammars(self) -> Grammars:
        """What keeps texts to a prescribed form."""
        return Grammars(self.tokenizer, self.vocabulary, self.ends)


class Shelf:
    """All that is served. Changed by the engine's thread, which is the only one that runs the model."""

    def __init__(self, model: PreTrainedModel, name: str, root: str, tokenizer: Any):
        self.model = model
        self._swarm = swarm_of(model)
        ends = model.generation_config.eos_token_id  # type: ignore[union-attr]
        self._numbers = vocabulary_size(model.config), (ends,) if isinstance(ends, int) else tuple(ends or ())
        self.base = Served(name, root, self._describe(), tokenizer, *self._numbers)
        self._all = {name: self.base}
        self._peft: PeftModel | None = None
        self._count = 0

    def __iter__(self) -> Iterator[Served]:
        return iter(list(self._all.values()))

    def get(self, name: str) -> Served | None:
        """What has this name."""
        return self._all.get(name)

    def load(self, name: str, folder: Path) -> Served:
        """Put the PEFT adapter in `folder` on the model, as `name`.

        Raises `BadUsage` for a name that is taken, and for an adapter that does not fit or cannot be served.
        """
        if name in self._all:
            raise BadUsage(f"The name {name!r} is taken; unload it first, or give another one.")
        from peft import PeftConfig, PeftModel
        from safetensors import SafetensorError

        self._count += 1
        alias = f"served{self._count}"
        try:
            config = PeftConfig.from_pretrained(str(folder))
            if config.is_prompt_learning:
                raise BadUsage(
                    f"{folder} is an adapter of {config.peft_type.value}, which puts tokens before each prompt and is "
                    "not served by a gateway; use `peer generate --adapter`."
                )
            if self._peft is None:
                self._peft = PeftModel.from_pretrained(self.model, str(folder), adapter_name=alias)
            else:
                self._peft.load_adapter(str(folder), adapter_name=alias)
            self._peft.eval()
            self._all[name] = served = self._served(name, alias, folder)
        except (ValueError, OSError, RuntimeError, LookupError, TypeError, AttributeError, SafetensorError) as error:
            self._forget(alias)
            raise BadUsage(f"{folder} cannot be put on the model as an adapter ({first_line(error)}).") from error
        except BaseException:
            self._forget(alias)
            raise
        return served

    def unload(self, name: str) -> None:
        """Take an adapter off. Raises `BadUsage` for what is none."""
        served = self._all.get(name)
        if served is None or not served.alias:
            raise BadUsage(f"No adapter {name!r} is loaded; /v1/models lists those that are.")
        del self._all[name]
        self._forget(served.alias)

    @contextmanager
    def on(self, served: Served | None) -> Iterator[None]:
        """Within the block the model's own parts are as `served` has them; None: as they are without an adapter."""
        if self._peft is None or not any(other.is_outside for other in self):
            yield
            return
        if served is not None:
            self._peft.set_adapter(served.alias)
        with nullcontext() if served else self._peft.disable_adapter():
            yield

    def _served(self, name: str, alias: str, folder: Path) -> Served:
        from peft import get_peft_model_state_dict

        assert self._peft is not None
        self._peft.set_adapter(alias)
        work = self._describe()
        ghosts = self._swarm.layer.path_in(self.model)
        names = get_peft_model_state_dict(self._peft, adapter_name=alias)
        is_outside = any(f".{ghosts}." not in key for key in names)
        tokenizer = self.base.tokenizer
        if any((folder / file).exists() for file in ("tokenizer_config.json", "chat_template.jinja")):
            tokenizer = load_adapted_tokenizer(str(folder), self.base.root)
        return Served(name, str(folder), work, tokenizer, *self._numbers, self.base.name, alias, is_outside)

    def _forget(self, alias: str) -> None:
        """Take off an adapter, or what there is of one that could not be loaded."""
        if self._peft is not None and alias in self._peft.peft_config:
            self._peft.delete_adapter(alias)

    def _describe(self) -> Work:
        work = self._swarm.blocks.describe(None, None)
        return to_host_memory(work, torch.empty(0))[0]
