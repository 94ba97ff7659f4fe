"""Data files to rows: JSON, JSON Lines, CSV, Parquet and plain text, each row with the place it came from."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.tune.errors import DataError

_LARGEST_CELL = 16 << 20  # characters; the csv module's own limit of 128 Ki is less than a long document
_PARQUET_BATCH = 1024


@dataclass(frozen=True, slots=True)
class Row:
    """One record as it stands in its file.

    `place` names it for an error ("data.jsonl: line 7"); `whole_file` marks the single row that a plain text file is.
    """

    place: str
    fields: Mapping[str, Any]
    whole_file: bool = False


def read_rows(paths: Sequence[Path]) -> Iterator[Row]:
    """The rows of the files in turn; the files' types are told by their suffixes.

    Raises:
        DataError: a file is missing, empty, of an unknown type or broken; the text names the line where that is known.
    """
    for path in paths:
        reader = READERS.get(path.suffix.lower())
        if reader is None:
            raise DataError(f"{path}: unknown file type {path.suffix!r}; known are {', '.join(READERS)}")
        number = 0
        try:
            for number, row in enumerate(reader(path), start=1):  # noqa: B007
                yield row
        except OSError as error:
            raise DataError(f"{path}: can't be read: {error.strerror or error}") from error
        except RecursionError as error:
            raise DataError(f"{path}: is nested too deeply") from error
        if number == 0:
            raise DataError(f"{path}: holds no records")


def _decode(path: Path, raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text{place or f' (byte {error.start})'}; save it as UTF-8") from error


def _as_fields(place: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f'{place} is no object with named fields, such as {{"instruction": …, "output": …}}')
    return value


def _read_json(path: Path) -> Iterator[Row]:
    text = _decode(path, path.read_bytes(), "")
    if not text.strip():
        return
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; if it holds one object a line, name it .jsonl" if error.msg == "Extra data" else ""
        raise DataError(f"{path}: broken JSON on line {error.lineno}: {error.msg}{hint}") from error
    if not isinstance(values, list):
        raise DataError(f"{path}: must hold a list of records; a file with one object a line is named .jsonl")
    for number, value in enumerate(values, start=1):
        place = f"{path}: record {number}"
        yield Row(place, _as_fields(place, value))


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            line = _decode(path, raw, f" on line {number}").strip()
            if not line:
                continue
            place = f"{path}: line {number}"
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}: broken JSON on line {number}: {error.msg}") from error
            yield Row(place, _as_fields(place, value))


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(_LARGEST_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for fields in reader:
                place = f"{path}: line {reader.reader.line_num}"
                if None in fields or None in fields.values():
                    wanted = len(reader.fieldnames or ())
                    raise DataError(f"{place} does not have the {wanted} cells that the header names")
                yield Row(place, fields)
        except csv.Error as error:
            raise DataError(f"{path}: broken CSV on line {reader.reader.line_num}: {error}") from error
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: is not UTF-8 text after line {reader.reader.line_num}; save it as UTF-8"
            ) from error


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: reading Parquet needs the package pyarrow; pip install pyarrow") from error
    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_PARQUET_BATCH):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}: record {number}", {name: _given(value) for name, value in fields.items()})
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: is not a readable Parquet file: {str(error).splitlines()[0]}") from error


def _given(value: Any) -> Any:
    """`value` without the nulls of its objects: Parquet gives every object of a column the keys of all of them."""
    if isinstance(value, dict):
        return {key: _given(held) for key, held in value.items() if held is not None}
    return [_given(held) for held in value] if isinstance(value, list) else value


def _read_text(path: Path) -> Iterator[Row]:
    text = _decode(path, path.read_bytes(), "")
    if text.strip():
        yield Row(str(path), {"text": text}, whole_file=True)


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
