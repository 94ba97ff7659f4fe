"""PEFT's module trees on a span: how they are made."""

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from torch import nn

from peer.adapters.peft_trees import build_tree
from peer.span.span import Span
from protocol.adapters import AdapterSpec
from tests.tools.spans import END, START


def test_two_peers_of_one_process_make_them_at_the_same_time(spans: Callable[..., Span]) -> None:
    """PEFT replaces `register_parameter` meanwhile; of two the later would put back what the earlier had put there."""
    before, span, begin = nn.Module.register_parameter, spans("llama"), threading.Barrier(2)
    targets = tuple(f"{block}.self_attn.{name}_proj" for block in range(START, END) for name in "qkvo")

    def build() -> None:
        begin.wait()
        for rank in range(1, 6):
            build_tree(span, [AdapterSpec(name="default", method="LORA", options={"r": rank}, targets=targets)], 10**9)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(2) as threads:
            for made in [threads.submit(build) for _ in range(2)]:
                made.result()
        assert nn.Module.register_parameter is before
    finally:
        sys.setswitchinterval(interval)
        nn.Module.register_parameter = before  # type: ignore[method-assign]
