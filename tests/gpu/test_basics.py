"""The GPU is what the other tests take it for: also the pretended one, of which they believe everything."""

import copy
from typing import Any

import pytest
import torch


def test_values_and_gradients_are_those_of_the_cpu(device: torch.device) -> None:
    left, right = torch.randn(3, 4), torch.randn(4, 5)
    mine = left.to(device).requires_grad_()
    (mine @ right.to(device)).relu().sum().backward()
    assert mine.grad is not None
    assert mine.grad.device == device
    torch.testing.assert_close(mine.grad.cpu(), ((left @ right) > 0).float() @ right.T)


def test_devices_do_not_mix(device: torch.device) -> None:
    here = torch.ones(3, device=device)
    assert torch.equal((here + torch.tensor(1.0)).cpu(), torch.full((3,), 2.0)), "a single number may be anywhere"
    with pytest.raises(RuntimeError, match="same device"):
        here + torch.ones(3)
    with pytest.raises(RuntimeError, match="same device"):
        torch.arange(3)[torch.tensor([0], device=device)]


def test_views_share_memory(device: torch.device) -> None:
    whole = torch.ones(2, 3, 4, device=device)
    whole.transpose(1, 2)[:, 1:3].zero_()
    assert float(whole.cpu().sum()) == 12
    assert copy.deepcopy(whole).data_ptr() != whole.data_ptr()


def test_pinned_memory_goes_over(device: torch.device) -> None:
    host = torch.arange(4.0).pin_memory()
    assert torch.equal(host.to(device, non_blocking=True).cpu(), host)


def test_memory_is_limited(pretended: Any, device: torch.device) -> None:
    before = pretended.bytes_now()
    held = torch.empty(1000, device=device)
    assert torch.cuda.memory_allocated() == pretended.bytes_now() == before + 4000
    pretended.limit(before + 6000)
    assert torch.cuda.mem_get_info() == (2000, before + 6000)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        torch.empty(1000, device=device)
    torch.empty(1000, device="cuda:1")  # whose memory is its own
    del held
    assert pretended.bytes_now() == before
    assert pretended.bytes_most() == before + 4000


def test_operations_and_waits_are_counted(pretended: Any, device: torch.device) -> None:
    seen: list[str] = []
    pretended.on_wait(seen.append)
    one = torch.ones(3).to(device)
    total = float((one * 2).sum())
    assert total == 6
    assert seen == ["copy to the device", "aten::_local_scalar_dense"]
    assert pretended.waits() == dict.fromkeys(seen, 1)
    assert pretended.operations() == {"copy to the device": 1, "aten::mul": 1, "aten::sum": 1, seen[1]: 1}
    assert pretended.launches() == 4


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_one_operation_with_the_numbers_of_the_cpu(
    pretended: Any, device: torch.device, masked: bool
) -> None:
    chance = torch.Generator().manual_seed(0)
    given = [torch.randn(2, heads, 9, 8, generator=chance) for heads in (4, 2, 2)]
    mask = torch.ones(2, 1, 9, 9).tril().log() if masked else None
    found = []
    for where in (torch.device("cpu"), device):
        own = [tensor.to(where).requires_grad_() for tensor in given]
        pretended.reset()
        own_mask = None if mask is None else mask.to(where)
        attend: Any = torch.nn.functional.scaled_dot_product_attention
        result = attend(*own, attn_mask=own_mask, is_causal=not masked, enable_gqa=True)
        found.append([result, *torch.autograd.grad(result.square().sum(), own)])
    assert pretended.operations()["aten::_scaled_dot_product_efficient_attention"] == 1
    assert pretended.operations()["aten::_scaled_dot_product_efficient_attention_backward"] == 1
    assert all(torch.equal(mine.cpu(), other) for other, mine in zip(*found, strict=True))
