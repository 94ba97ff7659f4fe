"""What an edit does to a shape, to a tensor and to Transformers' own layers is one and the same."""

import pytest
import torch
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from protocol import swarm_pb2 as pb
from protocol.cache_edits import read_edit
from protocol.errors import BadRequest

ROWS, TOKENS = 3, 5


def rows(*index: int) -> pb.IndexList:
    return pb.IndexList(index=index)


@pytest.mark.parametrize(
    "message",
    [
        pb.CacheEdit(crop=0),
        pb.CacheEdit(crop=2),
        pb.CacheEdit(repeat_interleave=2),
        pb.CacheEdit(reorder=rows(2, 0, 0)),
        pb.CacheEdit(select=rows(1)),
        pb.CacheEdit(select=rows(2, 2, 1, 0)),
    ],
)
def test_shape_tensor_and_layer_agree(message: pb.CacheEdit) -> None:
    edit, layer = read_edit(message), DynamicLayer()
    keys = torch.randn(ROWS, 2, TOKENS, 4)
    layer.update(keys, -keys)
    beside = keys[:, 0]  # (rows, tokens, ...)
    edit.layer(layer)
    after = edit.tensor(beside)
    assert after.shape[:2] == (edit.rows(ROWS), edit.tokens(TOKENS))
    assert torch.equal(layer.keys[:, 0], after)
    assert torch.equal(layer.values[:, 0], -after)


@pytest.mark.parametrize(
    "message", [pb.CacheEdit(repeat_interleave=2), pb.CacheEdit(reorder=rows(2, 0, 0)), pb.CacheEdit(select=rows(2, 0))]
)
def test_rows_of_linear_attention(message: pb.CacheEdit) -> None:
    """Transformers' layer has no name for repeating and selecting rows."""
    edit, layer = read_edit(message), LinearAttentionLayer()
    edit.layer(layer)  # it has seen nothing yet
    states = torch.randn(ROWS, 4, 3)
    layer.update_conv_state(states, conv_kernel_size=3)
    layer.update_recurrent_state(-states)
    edit.layer(layer)
    after = edit.tensor(states)
    assert torch.equal(layer.conv_states[0], after)
    assert torch.equal(layer.recurrent_states[0], -after)


def test_an_edit_that_nobody_knows() -> None:
    with pytest.raises(BadRequest, match="different versions"):
        read_edit(pb.CacheEdit())


def test_no_more_tokens_are_dropped_than_there_are() -> None:
    """Of tokens that a client remembers there may be fewer than a cache has, which may begin with a KV prefix."""
    assert read_edit(pb.CacheEdit(crop=7)).tensor(torch.ones(1, TOKENS, 2)).shape == (1, 0, 2)
