"""The types of blocks that a span has: what is tried when it is loaded is tried on one of each."""

from peer.span.span import Span


def blocks_of_each_type(span: Span) -> list[int]:
    """The first block of each type: of other layers, made of other modules, or with other keys and values."""
    layers = getattr(span.config, "layer_types", None) or [""] * span.end
    blocks = span.where.of(span.model)
    types = {
        (layers[i], span.kv_shapes.get(i), *(type(module) for module in blocks.get_submodule(str(i)).modules())): i
        for i in reversed(span.blocks)
    }
    return sorted(types.values())
