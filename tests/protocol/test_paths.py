"""Paths as people write them."""

from pathlib import Path

import pytest

from protocol.machine.paths import expand, local_path


def test_a_home_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/homes/ada")
    assert local_path("~/tuned") == Path("/homes/ada/tuned")
    assert local_path("./~/tuned") == Path("~/tuned")
    assert expand("~/models/a") == "/homes/ada/models/a"
    assert expand("bigscience/bloom-7b1") == "bigscience/bloom-7b1"


def test_what_is_no_path_here() -> None:
    with pytest.raises(ValueError, match="~nobody-here/x is in the home of a user that this machine does not have"):
        local_path("~nobody-here/x")
    for url in ("https://example.org//a.jsonl", "hf://datasets/a/b", "s3://bucket/out"):
        with pytest.raises(ValueError, match=f"{url} is a URL; expected a path on this machine"):
            local_path(url)
