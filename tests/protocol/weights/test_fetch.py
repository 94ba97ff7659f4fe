"""Fetching from members that give rightly, wrongly, late, or not to the end; what was fetched is not fetched again."""

import asyncio
import errno
import os
import shutil
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import BadUsage, NoWeights
from protocol.weights import fetch
from protocol.weights.cache import Cache
from protocol.weights.fetch import fetch_manifest
from protocol.weights.manifest import Manifest
from protocol.weights.parts import Held
from tests.tools.weights import (
    MODEL,
    Dying,
    Giver,
    Liar,
    MemorySwarm,
    assert_equal_files,
    fetching,
    flipped,
    hold_folder,
    piece,
    silent,
)


@pytest.fixture(scope="module")
def folder(models: Callable[[str], Path]) -> Path:
    return models("llama")


@pytest.fixture
def held(folder: Path, tmp_path: Path) -> Held:
    return hold_folder(folder, tmp_path / "kept")


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (
        ("_LOOK_UP", 0.1),
        ("_LOOK_AGAIN", 0.02),
        ("_FIRST_REST", 0.1),
        ("_ELSEWHERE", 0.3),
        ("PATIENCE", 1.0),
    ):
        monkeypatch.setattr(fetch, name, seconds)


def play(script: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(script, 20))


def test_only_what_is_asked_for_comes(folder: Path, held: Held, tmp_path: Path) -> None:
    async def script() -> None:
        giver = Giver(held)
        async with fetching(held, tmp_path / "cache", {"a": giver}) as (parts, fetch):
            await fetch.run([1, 3, 5])
            assert sorted(giver.given) == [1, 3, 5]
            assert [number for number in range(len(held.manifest.pieces)) if parts.has(number)] == [1, 3, 5]
            assert_equal_files(parts, folder, [1, 3, 5])
            await fetch.run([3, 4, 5])
            assert sorted(giver.given) == [1, 3, 4, 5]

    play(script())


@pytest.mark.parametrize(
    "lie",
    [
        flipped,
        silent,
        Dying(2),
        lambda held, number: piece(b""),
        lambda held, number: piece(b"x", "other"),
        lambda held, number: piece(held.read(number)[:-1]),
        lambda held, number: piece(held.read((number + 1) % len(held.manifest.pieces))),
    ],
    ids=["flips a bit", "stalls", "dies", "sends nothing", "sends another tensor", "cuts short", "sends another piece"],
)
def test_a_member_that_gives_wrongly(lie: Any, folder: Path, held: Held, tmp_path: Path) -> None:
    async def script() -> None:
        members = {"liar": Liar(held, lie), "honest": Giver(held)}
        async with fetching(held, tmp_path / "cache", members) as (parts, fetch):
            everything = range(len(held.manifest.pieces))
            await fetch.run(everything)
            assert_equal_files(parts, folder, everything)
            assert members["honest"].given

    play(script())


def test_who_gave_a_wrong_piece_is_asked_no_more(held: Held, tmp_path: Path) -> None:
    async def script() -> None:
        liar = Liar(held, flipped)
        async with fetching(held, tmp_path / "cache", {"liar": liar}) as (parts, fetch):
            with pytest.raises(NoWeights, match=r"Nobody in the swarm gives the last 1 pieces"):
                await fetch.run([2])
            assert len(liar.given) == 1
            assert not parts.has(2)

    play(script())


def test_a_fetch_that_was_killed_goes_on(folder: Path, held: Held, tmp_path: Path) -> None:
    """What had come is checked, and not fetched again; what is broken is."""

    async def begin() -> None:
        async with fetching(held, tmp_path / "cache", {"a": Giver(held)}) as (parts, fetch):
            parts.settle = lambda numbers: None  # type: ignore[method-assign]
            await fetch.run([1, 2, 3, 4])

    async def go_on() -> None:
        broken = held.manifest.pieces[3]
        (path,) = (tmp_path / "cache").rglob(broken.file)
        with path.open("r+b") as file:
            file.seek(broken.start)
            file.write(b"\0" * broken.size)
        giver = Giver(held)
        async with fetching(held, tmp_path / "cache", {"a": giver}) as (parts, fetch):
            assert not parts.holdings().any(), "nothing counts that was not checked"
            await fetch.run([1, 2, 3, 4, 5])
            assert sorted(giver.given) == [3, 5]
            assert_equal_files(parts, folder, [1, 2, 3, 4, 5])
        async with fetching(held, tmp_path / "cache", {}) as (parts, fetch):
            assert parts.holdings().sum() == 5
            await fetch.run([1, 2, 3, 4, 5])

    play(begin())
    play(go_on())


def test_copies_made_at_the_same_time_share_the_work(held: Held, tmp_path: Path) -> None:
    """Four members fetch all of a model from one, and give on what they get."""

    async def script() -> None:
        founder = Giver(held)
        members: dict[str, Giver] = {"QmFounder": founder}
        everything = range(len(held.manifest.pieces))
        names = [f"Qm{letter * 44}" for letter in "abcd"]
        caches = [Cache(tmp_path / name) for name in names]
        parts = []
        for name, cache in zip(names, caches, strict=True):
            parts.append(cache.open(held.manifest, MODEL))
            members[name] = Giver(parts[-1])
        runs = []
        for name, cache, one in zip(names, caches, parts, strict=True):
            runs.append(fetch.Fetch(one, "tiny", MemorySwarm(members, name, shares=True), cache))
        await asyncio.gather(*(run.run(everything) for run in runs))
        for one in parts:
            assert one.holdings().all()
        left = sum(held.manifest.pieces[number].size for number in founder.given)
        assert left <= 1.6 * held.manifest.size, Counter(founder.given)

    play(script())


def test_a_member_that_names_another_that_is_not_there(folder: Path, held: Held, tmp_path: Path) -> None:
    async def script() -> None:
        giver = Giver(held)
        elsewhere = f"Qm{'x' * 44}"
        giver.uploads.holder = lambda *asked: None if asked[-1] else elsewhere  # type: ignore[method-assign]
        async with fetching(held, tmp_path / "cache", {"a": giver}) as (parts, fetch):
            await fetch.run([1, 2])
            assert_equal_files(parts, folder, [1, 2])

    play(script())


def test_a_member_that_lies_about_its_manifest(held: Held) -> None:
    async def script() -> None:
        members = {"liar": Liar(held, flipped), "honest": Giver(held)}
        swarm: Any = MemorySwarm(members)
        assert (await fetch_manifest(swarm, held.manifest.hash)).hash == held.manifest.hash
        del members["honest"]
        with pytest.raises(NoWeights, match="This is not the manifest"):
            await fetch_manifest(swarm, held.manifest.hash)

    play(script())


def test_a_manifest_that_nobody_can_fulfil(held: Held, tmp_path: Path) -> None:
    """It is well formed, and its pieces are of other bytes than those that are given for them."""

    async def script() -> None:
        files = tuple(
            file.model_copy(update={"pieces": tuple((size, "0" * 64) for size, _ in file.pieces)})
            for file in held.manifest.files
        )
        async with fetching(Held(Manifest(files=files), {}), tmp_path / "cache", {"a": Liar(held, flipped)}) as (
            _,
            run,
        ):
            with pytest.raises(NoWeights, match="Nobody"):
                await run.run([0])

    play(script())


def test_a_full_disk(held: Held, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def script() -> None:
        async with fetching(held, tmp_path / "cache", {"a": Giver(held)}) as (parts, fetch):
            monkeypatch.setattr(os, "pwrite", full)
            with pytest.raises(BadUsage, match=r"^The disk is full: .*make room"):
                await fetch.run([1])
            monkeypatch.undo()
            assert not parts.has(1)

    play(script())


def test_a_slow_member_gives_signs_of_life(held: Held, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose rate allows a piece every second only, where a silence of half a second is the end."""
    monkeypatch.setattr("peer.service.connection.HEARTBEAT", 0.1)
    size = max(piece.size for piece in held.manifest.pieces)

    async def script() -> None:
        async with fetching(held, tmp_path / "cache", {"a": Giver(held, rate=size)}) as (_, fetch):
            numbers = [number for number, piece in enumerate(held.manifest.pieces) if piece.size == size][:2]
            begin = asyncio.get_running_loop().time()
            await fetch.run(numbers)
            assert asyncio.get_running_loop().time() - begin > 0.9 * (len(numbers) - 1)

    play(script())


def test_a_member_whose_files_were_changed(folder: Path, tmp_path: Path) -> None:
    """It notices before it gives a wrong piece, and gives nothing of that model any more."""
    ours = Path(shutil.copytree(folder, tmp_path / "ours"))
    held = hold_folder(ours, tmp_path / "kept")
    (number,) = held.manifest.numbers["config.json"]

    async def script() -> None:
        giver = Giver(held)
        async with fetching(held, tmp_path / "cache", {"changed": giver, "honest": Giver(held_elsewhere)}) as (
            parts,
            run,
        ):
            (ours / "config.json").write_text("{}" * held.manifest.pieces[number].size)
            await run.run([number])
            assert parts.has(number)
            await run.run(range(len(held.manifest.pieces)))
            assert not giver.given

    held_elsewhere = hold_folder(folder, tmp_path / "kept")
    assert held_elsewhere.manifest == held.manifest
    play(script())
