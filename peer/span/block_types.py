"""The types of blocks that a span has: what is tried or measured when it is loaded, is so on one of each."""

from transformers import PreTrainedModel

from peer.span.span import Span


def block_types(span: Span, model: PreTrainedModel) -> dict[int, int]:
    """Each block of a span -> the first one of its type.

    Blocks of a type have layers of one kind, made of the same modules and parameters, with the same keys and values.
    `model`: the span's own, or a tree with a client's adapters.
    """
    layers = getattr(span.config, "layer_types", None) or [""] * span.end
    blocks = span.where.of(model)
    first: dict[object, int] = {}
    found = {}
    for i in span.blocks:
        block = blocks.get_submodule(str(i))
        modules = tuple(type(module) for module in block.modules())
        shapes = tuple((name, parameter.shape) for name, parameter in block.named_parameters())
        found[i] = first.setdefault((layers[i], span.kv_shapes.get(i), modules, shapes), i)
    return found


def blocks_of_each_type(span: Span) -> list[int]:
    """The first block of each type."""
    return sorted(set(block_types(span, span.model).values()))
