"""The kinds of blocks that a span has: what is tried out when it is loaded is tried on one of each."""

from peer.span.span import Span


def blocks_of_each_kind(span: Span) -> list[int]:
    """The first block of each kind of layer, made of other modules, or with other keys and values."""
    types = getattr(span.model.config, "layer_types", None) or [""] * span.end
    blocks = span.where.of(span.model)
    kinds = {
        (types[i], span.kv_shapes.get(i), *(type(module) for module in blocks.get_submodule(str(i)).modules())): i
        for i in reversed(span.blocks)
    }
    return sorted(kinds.values())
