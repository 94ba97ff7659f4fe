"""Training calls of several clients, run together: what `peer.training.runner` needs to know of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from peer.adapters.lora import find_lora
from peer.adapters.store import StoredAdapter
from peer.span.span import Mode, Span
from peer.training.joined.products import Products, adding
from peer.training.joined.side_by_side import MOST, run_together


class Together:
    """Runs training calls of at most `most_tokens` tokens side by side, so that each weight is read once for all."""

    most = MOST
    """Calls at once."""

    def __init__(self, span: Span, most_tokens: int):
        self._span, self._products, self.most_tokens = span, Products(span), most_tokens

    def takes(self, mode: Mode, adapter: StoredAdapter | None) -> bool:
        """Whether a call with this mode and adapter, and without a KV prefix, gives together what it gives alone.

        Dropout is drawn from one generator for all, and module trees of adapters other than LoRA hold one client's
        tensors at a time.
        """
        if mode.dropout_seed is not None or mode.autocast is not None:
            return False
        if adapter is None:
            return self._products.have(())
        if adapter.lora is None or (mode.training and adapter.manifest.has_dropout):
            return False
        return self._products.have(adapter.lora.deltas)

    def meeting(self) -> AbstractContextManager[None]:
        """Within the block calls can meet; graphs that are made in it meet in their backward passes, too."""
        return self._products.meeting()

    def run(self, works: Sequence[Callable[[], Any]]) -> list[Any]:
        """What each of `works`, at most `most`, returned or raised. They run side by side."""
        return run_together(works)

    @contextmanager
    def adding(self, adapter: StoredAdapter, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Within the block the span runs with a LoRA that `takes` allowed, its tensors being `tensors`.

        On this thread only: no module tree is needed, which holds one client's tensors at a time.
        """
        lora = find_lora(self._span, adapter.manifest, tensors)
        assert lora is not None, "`takes` refuses others"
        with adding(lora.deltas):
            yield
