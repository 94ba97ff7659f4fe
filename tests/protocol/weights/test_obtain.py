"""Which of the models that are offered a name stands for; what of the cache goes when there is no room; progress."""

import io
import os
import sys
import time
from pathlib import Path

import pytest

from protocol.errors import BadUsage
from protocol.records import ModelId, SharedModel, WeightsRecord
from protocol.weights.cache import Cache
from protocol.weights.manifest import FileEntry, Manifest
from protocol.weights.obtain import Offer, Pins, choose, offers
from protocol.weights.progress import Progress

HASH = "0123456789abcdef" * 2


def record(letter: str, *given: tuple[str, str, int, int]) -> WeightsRecord:
    models = tuple(
        SharedModel(model=ModelId(name=name, config_hash=HASH, num_blocks=5), manifest=m * 64, held=held, wanted=wanted)
        for name, m, held, wanted in given
    )
    return WeightsRecord(peer_id=f"Qm{letter * 44}", models=models)


@pytest.fixture
def pins(tmp_path: Path) -> Pins:
    return Pins(tmp_path)


FOUND = offers(
    [
        record("a", ("lab", "1", 9, 9), ("other", "3", 9, 9)),
        record("b", ("lab", "2", 9, 9)),
        record("c", ("lab", "2", 9, 9)),
        record("d", ("lab", "1", 0, 9)),
        record("e", ("lab", "1", 5, 9)),
    ]
)


def chosen(asked: str, pins: Pins) -> str:
    offer = choose(FOUND, asked, pins)
    assert isinstance(offer, Offer)
    return offer.label


def test_the_version_that_most_hold_whole(pins: Pins, caplog: pytest.LogCaptureFixture) -> None:
    assert chosen("lab", pins) == f"lab@{'2' * 12}"
    assert f"the swarm has lab@{'1' * 12} as well" in caplog.text
    caplog.clear()
    assert chosen("other", pins) == f"other@{'3' * 12}"
    assert not caplog.text
    assert choose(FOUND, "nobody's", pins) is None
    assert choose([], "lab", pins) is None


def test_a_version_by_its_name(pins: Pins) -> None:
    pins.set("lab", "2" * 64)
    assert chosen("lab@1", pins) == f"lab@{'1' * 12}"
    assert chosen(f"lab@{'1' * 64}", pins) == f"lab@{'1' * 12}"
    with pytest.raises(BadUsage, match=f"it has lab@{'2' * 12}, lab@{'1' * 12}"):
        choose(FOUND, "lab@4", pins)


def test_the_first_use_is_kept(pins: Pins) -> None:
    pins.set("lab", "1" * 64)
    assert chosen("lab", pins) == f"lab@{'1' * 12}"
    pins.set("lab", "4" * 64)
    with pytest.raises(BadUsage, match=f"has used lab@{'4' * 12} under that name"):
        choose(FOUND, "lab", pins)
    pins.set("lab", None)
    assert chosen("lab", pins) == f"lab@{'2' * 12}"


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b'{"lab": 5}'])
def test_a_broken_file_of_pins_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "pins.json").write_bytes(content)
    assert chosen("lab", Pins(tmp_path)) == f"lab@{'2' * 12}"


def one_file(size: int, letter: str) -> Manifest:
    return Manifest(files=(FileEntry(name="config.json", pieces=((size, letter * 64),)),))


def test_the_model_used_longest_ago_goes_first(tmp_path: Path) -> None:
    manifests = [one_file(100, letter) for letter in "123"]
    for age, manifest in enumerate(manifests):
        cache = Cache(tmp_path, 250)
        parts = cache.open(manifest, ModelId(name=f"model{age}", config_hash=HASH, num_blocks=5))
        parts._states[0] = 2
        when = time.time() - 1000 * (3 - age)
        os.utime(parts.folder.parent / ".parts" / "model.json", (when, when))
        cache.close()
    cache = Cache(tmp_path, 250)
    assert [entry.model.name for entry in cache.entries()] == ["model2", "model1", "model0"]
    cache.open(manifests[0], ModelId(name="model0", config_hash=HASH, num_blocks=5))
    cache.make_room(50, manifests[0].hash)
    assert {entry.model.name for entry in cache.entries()} == {"model0", "model2"}
    with pytest.raises(BadUsage, match=r"allow more with --cache-size"):
        Cache(tmp_path, 120).make_room(50, manifests[0].hash)
    assert {entry.model.name for entry in cache.entries()} == {"model0"}, "what is in use stays"
    cache.close()


def test_a_disk_without_room(tmp_path: Path) -> None:
    with pytest.raises(BadUsage, match=r"^The disk is full: .* are free; make room, or have the cache elsewhere"):
        Cache(tmp_path, 10**18).make_room(10**17, "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    progress = Progress("lab", 100_000_000)
    time.sleep(0.2)
    progress.add(25_000_000, 3)
    progress.close()
    last = shown.getvalue().split("\r")[-1]
    assert "fetching lab:  25%" in last
    assert "25.0M/100M" in last
    assert "B/s" in last
    assert "from 3" in last


def test_a_line_now_and_then_elsewhere(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    progress = Progress("lab", 100_000_000)
    progress._said -= 11
    progress._arrivals[0] = (time.monotonic() - 5, 0)
    progress.add(25_000_000, 3)
    progress.add(25_000_000, 3)
    (line,) = caplog.messages
    assert line.startswith("fetching lab: 25.0 of 100.0 MB from 3 members at 5.0 MB/s, 15 s left")
