"""What an event loop says by itself."""

import logging

import pytest

from protocol.machine.event_loop import new_event_loop


def test_a_connection_that_was_closed_is_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    """uvloop calls its handler so when a connection is closed while TLS has something to send."""
    loop = new_event_loop()
    closed = RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")
    with caplog.at_level(logging.INFO):
        loop.call_exception_handler({"message": "Fatal error on SSL protocol", "exception": closed})
        assert not caplog.records
        loop.call_exception_handler({"message": "something else", "exception": RuntimeError("broken")})
        assert [record.getMessage().splitlines()[0] for record in caplog.records] == ["something else"]
    loop.close()
