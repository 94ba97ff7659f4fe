"""The file of a swarm key: its content, its rotation, and the commands for it."""

import logging
import re
from pathlib import Path

import pytest

from bootstrap.key_file import KeyFile, add_key, create_key, drop_old_keys, use_newest_key
from protocol.errors import BadUsage
from tests.tools.command import Command


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "swarm.key"
    create_key(path)
    return path


def names(path: Path) -> list[str]:
    return [key.id.hex() for key in KeyFile(path).current()]


def test_a_key_file_is_private_and_never_overwritten(file: Path) -> None:
    assert file.stat().st_mode & 0o777 == 0o600
    text = file.read_text()
    assert re.fullmatch(r"hivetune-key-1 [\w-]{43} \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ\n", text)
    with pytest.raises(BadUsage, match="never overwritten"):
        create_key(file)
    assert file.read_text() == text
    assert names(file) != [create_key(file.with_name("other"))]
    assert sorted(path.name for path in file.parent.iterdir()) == ["other", "swarm.key"]


def lines(*keys: str) -> bytes:
    return "".join(f"hivetune-key-1 {key} 2026-01-02T03:04:05Z\n" for key in keys).encode()


SECRET = "A" * 42 + "E"
BAD_FILES = {
    "empty": (b"", "holds 0 swarm keys"),
    "blank": (b"\n  \n", "holds 0 swarm keys"),
    "text": (b"hello\n", "Line 1 of"),
    "no text": (bytes(range(128, 256)), "Line 1 of"),
    "a second line": (lines(SECRET) + b"hello", "Line 2 of"),
    "a short key": (lines(SECRET[1:]), "Line 1 of"),
    "another version": (lines(SECRET).replace(b"key-1", b"key-2"), "Line 1 of"),
    "no date": (f"hivetune-key-1 {SECRET}".encode(), "Line 1 of"),
    "a date that is none": (lines(SECRET).replace(b"-01-", b"-13-"), "Line 1 of"),
    "many keys": (lines(*[SECRET] * 17), "holds 17 swarm keys"),
    "long": (b"\n" * 4096 + lines(SECRET), "over 4096 bytes"),
}


@pytest.mark.parametrize(("content", "said"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_is_no_key_is_refused_in_one_sentence(file: Path, content: bytes, said: str) -> None:
    file.write_bytes(content)
    with pytest.raises(BadUsage, match=said) as caught:
        KeyFile(file)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)
    assert SECRET[1:] not in str(caught.value)


def test_what_cannot_be_a_key_file(file: Path, tmp_path: Path) -> None:
    for path, said in (
        (tmp_path / "none", "No such file"),
        (tmp_path, "not a file"),
        (Path("/dev/zero"), "not a file"),
    ):
        with pytest.raises(BadUsage, match=said):
            KeyFile(path)
    file.chmod(0o604)
    with pytest.raises(BadUsage, match=r"every user of this machine; run `chmod 600"):
        KeyFile(file)
    file.chmod(0o640)
    assert len(names(file)) == 1


def test_a_rotation_step_by_step(file: Path) -> None:
    file.chmod(0o640)
    (old,) = names(file)
    for step, said in ((use_newest_key, "one key only"),):
        with pytest.raises(BadUsage, match=said):
            step(file)
    assert drop_old_keys(file) == old
    new = add_key(file)
    assert names(file) == [old, new]
    with pytest.raises(BadUsage, match="rotation is under way"):
        add_key(file)
    with pytest.raises(BadUsage, match="not used yet"):
        drop_old_keys(file)
    for _ in range(2):  # once more does no harm
        assert use_newest_key(file) == new
        assert names(file) == [new, old]
    for _ in range(2):
        assert drop_old_keys(file) == new
        assert names(file) == [new]
    assert file.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in file.parent.iterdir()] == ["swarm.key"]


def test_a_changed_file_is_read_again_and_a_broken_one_is_not_taken(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    keyring = KeyFile(file)
    (old,) = keyring.current()
    add_key(file)
    assert [key.id for key in keyring.current()][:1] == [old.id]
    assert len(keyring.current()) == 2
    assert [record.levelname for record in caplog.records] == ["INFO"]
    good = file.read_bytes()
    for spoil in (lambda: file.write_text("hello"), lambda: file.chmod(0o644), file.unlink):
        caplog.clear()
        spoil()
        for _ in range(3):
            assert len(keyring.current()) == 2
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        assert "goes on with the keys that it has" in caplog.text
    file.write_bytes(good.splitlines()[1])
    file.chmod(0o600)
    assert [key.id for key in keyring.current()] == [KeyFile(file).current()[0].id]


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command, file = Command(monkeypatch, capsys), tmp_path / "key"
    for name, said in (("create", "new key"), ("add", "Then: peer key use"), ("use", "Then: peer key drop")):
        outcome = command("key", name, file)
        assert (outcome.code, outcome.stderr) == (0, "")
        assert said in outcome.stdout
        for line in file.read_text().splitlines():
            assert line.split()[1] not in outcome.stdout
    (new, _) = names(file)
    assert command("key", "drop", file).code == 0
    assert names(file) == [new]
    assert "never overwritten" in command("key", "create", file).refusal()
    assert "cannot be read" in command("key", "add", tmp_path / "none").refusal()
    assert "cannot be written" in command("key", "create", tmp_path / "no" / "key").refusal()
