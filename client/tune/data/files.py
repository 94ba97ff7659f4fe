"""Data files to rows: JSON, JSON Lines, CSV, TSV, Parquet and plain text, each row with the place it came from."""

import csv
import glob
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from client.tune.errors import DataError

_LARGEST_CELL = 16 << 20  # characters; the csv module's own limit of 128 Ki is less than a long document
_PARQUET_BATCH = 1024
_GZIP = ".gz"
_SAVED_TO_DISK = ("state.json", "dataset_dict.json")
"""What `Dataset.save_to_disk` and `DatasetDict.save_to_disk` put into a folder."""


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

    A path may be a folder, whose files all have one type, or a pattern such as `data/*.jsonl`; files come in the order
    of their names then.

    Raises:
        DataError: a file is missing, empty, of an unknown type or broken; the text names the line where that is known.
    """
    for path in chain.from_iterable(map(_files, paths)):
        reader = READERS.get(_type(path))
        if reader is None:
            raise DataError(f"{path}: unknown file type {path.suffix!r}; {_KNOWN}")
        number = 0
        try:
            with _open(path) as file:
                for number, row in enumerate(reader(path, file), start=1):  # noqa: B007
                    yield row
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{path}: is not a whole gzip file ({error}); compress or copy it again") from error
        except OSError as error:
            raise DataError(f"{path}: can't be read: {error.strerror or error}") from error
        except RecursionError as error:
            raise DataError(f"{path}: is nested too deeply") from error
        if number == 0:
            raise DataError(f"{path}: holds no records")


def _files(path: Path) -> list[Path]:
    """The files that a path stands for."""
    try:
        if path.is_dir():
            return _in_folder(path)
        if path.exists():
            return [path]
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror or error}") from error
    found = [file for file in sorted(map(Path, glob.glob(str(path), recursive=True))) if file.is_file()]
    if found:
        return found
    if glob.has_magic(str(path)):
        raise DataError(f"{path}: matches no file")
    raise DataError(f"{path}: there is no such file; {_KNOWN}, and a data set of a hub has to be downloaded first")


def _in_folder(folder: Path) -> list[Path]:
    if any((folder / name).is_file() for name in _SAVED_TO_DISK):
        raise DataError(
            f"{folder}: is a data set that save_to_disk has written, which is not read; write it with to_parquet or"
            " to_json"
        )
    every = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    found = [path for path in every if _type(path) in READERS]
    types = sorted({_type(path) for path in found})
    if not types:
        raise DataError(f"{folder}: is a folder without data files; {_KNOWN}")
    if len(types) > 1:  # a README.txt beside the data is no data
        raise DataError(
            f"{folder}: is a folder with files of several types ({', '.join(types)}); give a pattern such as"
            f" {folder / '*'}{types[0]}"
        )
    return found


def _type(path: Path) -> str:
    """The suffix that says what is in a file."""
    name = path.name.lower()
    return Path(name.removesuffix(_GZIP)).suffix


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix.lower() == _GZIP else path.open("rb")  # type: ignore[return-value]


def _decode(path: Path, raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text{place or f' (byte {error.start})'}; save it as UTF-8") from error


def _as_fields(place: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f'{place} is no object with named fields, such as {{"instruction": …, "output": …}}')
    return value


def _read_json(path: Path, file: BinaryIO) -> Iterator[Row]:
    text = _decode(path, file.read(), "")
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


def _read_jsonl(path: Path, file: BinaryIO) -> Iterator[Row]:
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


def _read_csv(path: Path, file: BinaryIO, delimiter: str = ",") -> Iterator[Row]:
    csv.field_size_limit(_LARGEST_CELL)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    reader = csv.DictReader(text, delimiter=delimiter, strict=True)
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
        place = f" after line {reader.reader.line_num}" if reader.reader.line_num else ""  # it is read in pieces
        raise DataError(f"{path}: is not UTF-8 text{place}; save it as UTF-8") from error


def _read_parquet(path: Path, file: BinaryIO) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: reading Parquet needs the package pyarrow; pip install pyarrow") from error
    try:
        number = 0
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(_PARQUET_BATCH):
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


def _read_text(path: Path, file: BinaryIO) -> Iterator[Row]:
    text = _decode(path, file.read(), "")
    if text.strip():
        yield Row(str(path), {"text": text}, whole_file=True)


READERS: dict[str, Callable[[Path, BinaryIO], Iterator[Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
_KNOWN = f"known are {', '.join(READERS)}, and each of them with {_GZIP}"
