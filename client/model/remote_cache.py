"""The KV cache as Transformers sees it on a client: a length, and edits that travel with the next step."""

from typing import Any, NoReturn

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from client.generation.session import InferenceSession
from client.requests.work import Work
from protocol import swarm_pb2 as pb
from protocol.errors import BadUsage
from protocol.tensors import KvPrefix


class RemoteLayer(CacheLayerMixin):
    """Stands for all layers of a cache whose contents peers hold."""

    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, length: int = 0, keep_past: bool = False):
        self.is_initialized = True  # not by the base class, which would set keys and values
        self.length = length
        """Tokens, a KV prefix included."""
        self.keep_past = keep_past
        self.rows = 0
        self.edits: list[pb.CacheEdit] = []
        """Since the last step."""
        self.session: InferenceSession | None = None
        self.unsent: tuple[Work, torch.Tensor, int] | None = None
        """A forward with gradients that filled this cache in name only, and the length before it."""
        self.sources: tuple[torch.Tensor, ...] = ()
        """What the gradients of that forward go to, and so would those of whatever goes on from here."""

    @property
    def keys(self) -> NoReturn:  # type: ignore[override]
        """Raises `BadUsage`: they are on peers."""
        raise BadUsage(
            "The keys and values of this cache are on remote peers and cannot be looked at here; its length is "
            "get_seq_length()."
        )

    values = keys

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to allocate here."""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Never called: blocks run on peers."""
        raise BadUsage("Keys and values are on remote peers; nothing on this machine may update them.")

    def get_seq_length(self) -> int:
        """Tokens in the cache."""
        return self.length

    def get_max_length(self) -> int:
        """Unbounded as far as this machine knows."""
        return -1

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys for a mask."""
        return self.length + query_length, 0

    def activate_past_recording(self) -> None:
        """Sliding-window layers must stay croppable from now on."""
        self.keep_past = True

    def crop(self, max_length: int) -> None:
        """Drop `-max_length` tokens from the end (Transformers calls it with negative numbers)."""
        count = -max_length if max_length <= 0 else self.length - max_length
        if count >= self.length:
            self.reset()
        elif count > 0:
            self.length -= count
            self.edits.append(pb.CacheEdit(crop=count))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the rows."""
        self.rows = len(beam_idx)
        self.edits.append(pb.CacheEdit(reorder=pb.IndexList(index=beam_idx.tolist())))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.rows *= repeats
        self.edits.append(pb.CacheEdit(repeat_interleave=repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows, chosen in any way that a tensor is indexed."""
        device = indices.device if isinstance(indices, torch.Tensor) else None
        kept = torch.arange(self.rows, device=device)[indices].tolist()
        self.rows = len(kept)
        self.edits.append(pb.CacheEdit(select=pb.IndexList(index=kept)))

    def reset(self) -> None:
        """Empty the cache."""
        if self.session is not None:
            self.session.close()
        self.__init__(keep_past=self.keep_past)  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> "RemoteLayer":
        twin = RemoteLayer(self.length, self.keep_past)
        twin.rows = self.rows
        twin.edits, twin.unsent, twin.sources = list(self.edits), self.unsent, self.sources
        if self.session is not None:
            twin.session = self.session.fork()  # now, not lazily: the original may move on
        return twin

    def __reduce__(self) -> Any:
        raise BadUsage(
            "A cache that peers hold cannot be pickled; keep the tokens, and send them through the model again."
        )


def adopt(cache: Cache) -> tuple[RemoteLayer, KvPrefix]:
    """Turn a cache that Transformers made into a remote one, in place; also the KV prefix that PEFT had put into it.

    Raises `BadUsage` for a kind of cache that cannot be remote.
    """
    layers = cache.layers
    if not isinstance(cache, DynamicCache):
        raise BadUsage(f"A {type(cache).__name__} cannot hold keys of remote blocks; use the default cache.")
    keep_past = any(getattr(layer, "record_past", False) for layer in layers)
    contents = {i: (getattr(layer, "keys", None), getattr(layer, "values", None)) for i, layer in enumerate(layers)}
    prefix = {i: (k, v) for i, (k, v) in contents.items() if k is not None and v is not None and k.numel()}
    remote = RemoteLayer(cache.get_seq_length(), keep_past)
    cache.layers = [remote]
    cache.layer_class_to_replicate = None
    return remote, prefix
