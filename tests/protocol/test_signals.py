"""Signals that do what Ctrl-C does."""

import signal
from collections.abc import Iterator

import pytest

from protocol.machine.signals import like_interrupt


@pytest.fixture(autouse=True)
def handlers_come_back() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("on_interrupt", [signal.default_int_handler, signal.SIG_IGN])
def test_a_signal_does_what_ctrl_c_does(on_interrupt: signal.Handlers) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with like_interrupt(signal.SIGTERM):
        signal.signal(signal.SIGINT, on_interrupt)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_holds_ctrl_c_back_holds_the_signal_back() -> None:
    seen: list[int] = []
    with like_interrupt(signal.SIGTERM):
        signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
        signal.raise_signal(signal.SIGTERM)
    assert seen == [signal.SIGTERM]


def test_nohup_keeps_its_word() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with like_interrupt(signal.SIGHUP):
        signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
