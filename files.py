"""Local data files: json, jsonl, csv and parquet, read as text, faults named by line."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError

from utils import UserError, local_path

Row = dict[str, str]


def load(path: str, key: str, columns: list[str], lists: str | None = None) -> Dataset:
    """Read `columns` of a file, or of all files of a folder, as text.

    Kept in the cache of Hugging Face Datasets on disk: another process, or the next run,
    finds it there for as long as the files do not change. `key` is the setting that named
    the path, for messages; `lists` the one column that may hold lists, which become JSON.

    Raises `UserError` for a path without data, a broken file (with the line) or a missing
    column.
    """
    files = find(path, key)
    stamps = tuple((file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    # Tuples, because a list would be taken for shards to be read in parallel.
    arguments = {
        "files": tuple(files),
        "columns": tuple(columns),
        "lists": lists,
        "stamps": stamps,
    }
    try:
        return Dataset.from_generator(read, gen_kwargs=arguments)
    except DatasetGenerationError as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        raise UserError(f"{key}={path}: {cause or error}") from error


def find(path: str, key: str) -> list[Path]:
    """The data files that a path stands for; all of one format.

    Raises `UserError` where there are none.
    """
    found = local_path(path)
    if found is None:
        raise UserError(f"{key}={path}: there is no such file or folder.")
    files = [found]
    if found.is_dir():
        files = sorted(file for file in found.iterdir() if file.suffix in READERS)
    if not files or files[0].suffix not in READERS:
        raise UserError(
            f"{key}={path}: no data file here. Known: {', '.join(READERS)}."
        )
    if len({READERS[file.suffix] for file in files}) > 1:
        raise UserError(f"{key}={path}: files of several formats. Keep one kind.")
    if odd := [file.name for file in files if not file.is_file()]:
        raise UserError(
            f"{key}={path}: {odd[0]} is not a file, or a link that leads nowhere."
        )
    return files


def names(path: str, key: str) -> list[str]:
    """The columns that any record of a file or folder has. Raises `UserError` as `load`."""
    found: dict[str, None] = {}
    for file in find(path, key):
        try:
            for _, row in READERS[file.suffix](file):
                found |= dict.fromkeys(row)
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 text ({error.reason}).") from error
    return list(found)


def read(
    files: tuple[Path, ...], columns: tuple[str, ...], lists: str | None, stamps: Any
) -> Iterator[Row]:
    """All rows of all files, reduced to `columns`, every value as text ("" for none).

    `stamps` is not used here; it tells the cache whether the files are still the same.
    """
    empty = True
    for file in files:
        try:
            for line, row in READERS[file.suffix](file):
                if missing := [column for column in columns if column not in row]:
                    raise UserError(
                        f"{file}, {line}: no column {missing[0]!r} (dataset.columns, "
                        f"dataset.label). It has: {', '.join(row)}."
                    )
                if lists and not isinstance(row[lists], str):
                    row[lists] = json.dumps(row[lists], ensure_ascii=False)
                for column in columns:
                    if isinstance(row[column], (dict, list, bytes)):
                        raise UserError(
                            f"{file}, {line}: {column!r} holds a value of type "
                            f"{type(row[column]).__name__}; text or a number is needed."
                        )
                empty = False
                yield {column: text(row[column]) for column in columns}
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 text ({error.reason}).") from error
    if empty:
        raise UserError(f"{', '.join(map(str, files))}: no records here.")


def text(value: Any) -> str:
    """A value as the text that a prompt shows."""
    return "" if value is None else str(value)


def _lines(file: Path) -> Iterator[str]:
    # With their ends as they are, because a CSV's fields may hold them.
    with file.open(encoding="utf-8-sig", newline="") as lines:
        for number, line in enumerate(lines, start=1):
            if "\0" in line:
                raise UserError(
                    f"{file}, line {number}: it holds NUL bytes, so it is damaged, or "
                    "UTF-16. Save it as UTF-8."
                )
            yield line


def _json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{file}, line {number}: broken JSON ({error.msg})."
            ) from error
        yield f"line {number}", _object(record, f"{file}, line {number}")


def _json(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    content = file.read_text(encoding="utf-8-sig")
    try:
        records = json.loads(content)
    except json.JSONDecodeError as error:
        if not content.lstrip().startswith("["):
            yield from _json_lines(file)  # one object a line, under the other suffix
            return
        raise UserError(
            f"{file}, line {error.lineno}: broken JSON ({error.msg})."
        ) from error
    if not isinstance(records, list):
        raise UserError(f"{file}: an array of objects is needed, or one object a line.")
    for number, record in enumerate(records, start=1):
        yield f"record {number}", _object(record, f"{file}, record {number}")


def _object(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise UserError(f"{where}: an object with named columns is needed.")
    return record


def _csv(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(2**30)  # the default is shorter than many a document
    reader = csv.DictReader(_lines(file), strict=True)
    try:
        _header(reader.fieldnames or [], file)
        for row in reader:
            if None in row or None in row.values():
                raise UserError(
                    f"{file}, line {reader.line_num}: not as many fields as the header "
                    f"has ({len(reader.fieldnames or [])})."
                )
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise UserError(
            f"{file}, line {reader.reader.line_num}: broken CSV ({error})."
        ) from error


def _header(names: Sequence[str], file: Path) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{file}: two columns have the name {twice[0]!r}.")


def _parquet(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        table = pyarrow.parquet.ParquetFile(file)
        _header(table.schema_arrow.names, file)
        batches = table.iter_batches()
        records = (record for batch in batches for record in batch.to_pylist())
        for number, record in enumerate(records, start=1):
            yield f"record {number}", record
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{file}: broken parquet ({error}).") from error


READERS = {".json": _json, ".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet}
