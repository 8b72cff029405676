"""Local data files: json, jsonl, csv and parquet, read as text, faults named by line."""

import csv
import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError

from records import conversations
from records.conversations import Unfit
from utils import UserError, local_path

Row = dict[str, str]

# Where a row stands in its file, its values by column, and the names of all columns: a
# parquet file's row holds no others than were asked for.
Found = tuple[str, dict[str, Any], Iterable[str]]

# What may stand beside the files of a folder: no records by its suffix.
DOCUMENTS = {"", ".md", ".rst", ".txt", ".pdf", ".html", ".png", ".jpg", ".svg", ".bib"}

DOCUMENTS |= {
    ".cff",
    ".yaml",
    ".yml",
    ".toml",
    ".py",
    ".sh",
    ".ipynb",
    ".md5",
    ".sha256",
}

# What Hugging Face Datasets writes beside records.
NOTES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json"}

# Words in a file's name that tell which part of a dataset it is.
HELD_BACK = {"test", "testing", "validation", "valid", "val", "dev", "eval"}

# As datasets keeps what it has read by its arguments, not by the code that read it.
CODE = hashlib.sha256(
    b"".join(Path(file).read_bytes() for file in (__file__, conversations.__file__))
).hexdigest()

SPACE = re.compile(r"[ \t\r\n]*")  # of JSON

# Records of a parquet file in memory at a time; each may be a long text.
BATCH = 256


def load(
    path: str,
    key: str,
    columns: list[str],
    optional: str | None = None,
    lists: Sequence[str] = (),
    talks: dict[str, str | None] | None = None,
) -> Dataset:
    """Read `columns` of a file, or of all files of a folder, as text.

    Kept in the cache of Hugging Face Datasets on disk: another process, or the next run,
    finds it there for as long as the files do not change. `key` is the setting that named
    the path, for messages; `optional` the one column that a record may lack (some record
    has it), `lists` those that may hold lists or objects, which become JSON. `talks`: `dataset.columns`,
    if the records may be conversations (`conversations.row` says what becomes of them).

    Raises `UserError` for a path without data, a broken file (with the line), a missing
    column, or a cache that cannot be written.
    """
    found = find(path, key)
    try:
        stamps = tuple((file.stat().st_mtime_ns, file.stat().st_size) for file in found)
        sources = conversations.find(talks, _begins_with(found[0])) if talks else ()
        if sources:
            made = {talks.get(name) for name in ("instruction", "input", "output")}
            optional = optional if optional in sources else None
            columns = [name for name in columns if name not in made]
        # Tuples, because a list would be taken for shards to be read in parallel.
        arguments = {
            "files": tuple(found),
            "columns": tuple(columns),
            "optional": optional,
            "lists": tuple(lists),
            "sources": sources,
            "talks": talks if sources else None,
            "stamps": (*stamps, CODE),
        }
        return Dataset.from_generator(read, gen_kwargs=arguments)
    except (OSError, DatasetGenerationError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, UserError):
            raise cause from None
        if isinstance(cause, OSError):  # `read` has named those of the files themselves
            raise UserError(f"{key}={path}: {cache_fault(cause)}") from error
        raise UserError(f"{key}={path}: {cause}") from error


def cache_fault(error: OSError) -> str:
    """What keeps the cache of Hugging Face Datasets from being used, and what to do."""
    where = f" at {error.filename}" if error.filename else ""
    return (
        f"the cache {datasets.config.HF_DATASETS_CACHE} cannot be used "
        f"({error.strerror or error}{where}). Have HF_HOME name a folder that can be "
        "written and has room."
    )


def is_local(error: BaseException | None) -> bool:
    """Whether an error is of this machine's disk, and not of a network or a hub."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE)
    return isinstance(error, OSError) and (
        error.errno in full or bool(error.errno and error.filename)
    )


def find(path: str, key: str) -> list[Path]:
    """The data files that a path stands for; all of one format.

    Of a folder all that are not hidden. Raises `UserError` where there are none, and
    where something beside them may be data as well, or another part of the dataset.
    """
    where = f"{key}={path}"
    found = local_path(path)
    try:
        if found is None:
            os.stat(Path(path).expanduser())
        folder = found.is_dir()
        files = list(found.iterdir()) if folder else [found]
    except FileNotFoundError:
        raise UserError(f"{where}: there is no such file or folder.") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte
        cause = getattr(error, "strerror", None) or error
        raise UserError(f"{where} cannot be read: {cause}.") from error
    if folder:
        files = sorted(file for file in files if not file.name.startswith("."))
        _refuse_saved(files, key, where)
        files = [file for file in files if file.name not in NOTES]
        _refuse_others(files, key, where)
        files = [file for file in files if file.suffix.lower() in READERS]
    if not files or files[0].suffix.lower() not in READERS:
        raise UserError(f"{where}: no data file here. {_known(found)}")
    if len({READERS[file.suffix.lower()] for file in files}) > 1:
        raise UserError(f"{where}: files of several formats. Keep one kind.")
    if odd := [file.name for file in files if not file.is_file()]:
        raise UserError(
            f"{where}: {odd[0]} is not a file, or a link that leads nowhere."
        )
    return files


def _known(found: Path) -> str:
    """Which files are data, and what to do about a path that has none."""
    below = found.glob("*/*") if found.is_dir() else ()
    if near := sorted({str(f.parent) for f in below if f.suffix.lower() in READERS}):
        return f"The folders in it are not looked into: did you mean {near[0]}?"
    return f"Known: {', '.join(READERS)}. Another format has to be converted first."


def _refuse_saved(files: list[Path], key: str, where: str) -> None:
    names = {file.name for file in files}
    if "dataset_dict.json" in names or {"dataset_info.json", "state.json"} <= names:
        raise UserError(
            f"{where}: this is what datasets.save_to_disk writes. Write the records as a "
            f'file and name that: load_from_disk(...)["train"].to_json("train.jsonl"), '
            f"{key}=train.jsonl"
        )


def _refuse_others(files: list[Path], key: str, where: str) -> None:
    """What would be left out, or be mixed in, without a word."""
    data = [file for file in files if file.suffix.lower() in READERS]
    if not data:
        return
    others = [
        file.name for file in files if file not in data and _may_hold_records(file)
    ]
    if others:
        raise UserError(
            f"{where}: {_shown(others)} may hold records, and would not be read (known: "
            f"{', '.join(READERS)}). Convert or unpack it, move it elsewhere, or name one "
            f"file: {key}={data[0]}"
        )
    held = [file for file in data if HELD_BACK & set(_words(file.stem))]
    if held and len(held) < len(data):
        rest = [file for file in data if file not in held]
        raise UserError(
            f"{where}: {_shown([file.name for file in held])} has the name of what is "
            f"kept from training, and {_shown([file.name for file in rest])} has not. Name "
            f"one file ({key}={rest[0]}), or put those for training into a folder."
        )


def _may_hold_records(file: Path) -> bool:
    if file.is_dir():
        return any(below.suffix.lower() in READERS for below in file.iterdir())
    return file.suffix.lower() not in DOCUMENTS


def _words(stem: str) -> list[str]:
    return re.split(r"[^a-z]+", stem.lower())


def names(path: str, key: str) -> list[str]:
    """The columns that any record of a file or folder has. Raises `UserError` as `load`."""
    found: dict[str, None] = {}
    for file in find(path, key):
        try:
            for *_, columns in READERS[file.suffix.lower()](file, ()):
                found |= dict.fromkeys(columns)
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 text ({error.reason}).") from error
    return list(found)


def _begins_with(file: Path) -> list[str]:
    """The columns of a file's first record; none where it cannot be read."""
    with suppress(UserError, OSError, UnicodeDecodeError):
        for *_, names in READERS[file.suffix.lower()](file, ()):
            return list(names)
    return []


def read(
    files: tuple[Path, ...],
    columns: tuple[str, ...],
    optional: str | None,
    lists: tuple[str, ...],
    sources: tuple[str, ...],
    talks: dict[str, str | None] | None,
    stamps: Any,
) -> Iterator[Row]:
    """All rows of all files, reduced to `columns`, every value as text ("" for none).

    Beside them the records that `conversations.row` makes of `sources`, if there are any.
    `stamps` is not used here; it tells the cache whether the files are still the same.
    """
    empty, seen = True, optional is None
    for file in files:
        where = str(file)
        try:
            asked = (*columns, *sources)
            for line, row, names in READERS[file.suffix.lower()](file, asked):
                where = f"{file}, {line}"
                missing = [column for column in asked if column not in row]
                seen |= optional in row
                if missing and missing != [optional]:
                    raise UserError(f"{where}: {lacks(missing, names, row)}")
                for name in lists:
                    if isinstance(row.get(name), (list, dict)):
                        # A decimal or a date as `text` has it, the right answer being one.
                        row[name] = json.dumps(
                            row[name], ensure_ascii=False, default=str
                        )
                empty = False
                kept = {column: row.get(column) for column in columns}
                if sources:
                    kept |= conversations.row(row, sources, talks)
                yield {column: _checked(kept[column], column) for column in kept}
            where = str(file)
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 text ({error.reason}).") from error
        except Unfit as error:
            raise UserError(f"{where}: {error}") from error
        except OSError as error:
            raise UserError(
                f"{file} cannot be read: {error.strerror or error}."
            ) from error
    where = ", ".join(map(str, files))
    if empty:
        raise UserError(f"{where}: no records here.")
    if not seen:
        raise UserError(f"{where}: {lacks([optional], names)}")


def lacks(
    missing: list[str], names: Iterable[str], row: dict[str, Any] | None = None
) -> str:
    """That columns are not there, and what to do. `row`: a record, by which to tell."""
    names = [name.encode(errors="backslashreplace").decode() for name in names]
    talks = [name for name, value in (row or {}).items() if _is_chat(value)]
    if talks := talks or [name for name in names if name in conversations.FOUND]:
        return _chat_message(talks[0])
    wanted = " or ".join(map(repr, missing))
    return (
        f"no column {wanted} (dataset.columns, dataset.label). It has: {_shown(names)}. "
        "Name them, as in dataset.columns.output=answer; dataset.columns.input=null where "
        "there is none."
    )


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(names[:20]) + more


def _is_chat(value: Any) -> bool:
    """A list of turns, as OpenAI's `messages` and ShareGPT's `conversations` are."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return False
    return {"role", "content"} <= value[0].keys() or {"from", "value"} <= value[
        0
    ].keys()


def _chat_message(column: str) -> str:
    return (
        f"{column!r} holds conversations: dataset.columns.messages={column} takes a record "
        "from it."
    )


def _checked(value: Any, column: str) -> str:
    if _is_chat(value):
        raise Unfit(_chat_message(column))
    if isinstance(value, (dict, list, bytes)):
        raise Unfit(
            f"{column!r} holds a value of type {type(value).__name__}; text or a number "
            "is needed."
        )
    if isinstance(value, float) and math.isinf(value):
        raise Unfit(f"{column!r} holds {value}, which is no number of anything.")
    checked = text(value)
    try:
        checked.encode()
    except UnicodeEncodeError as error:
        raise Unfit(f"{column!r} holds half a character ({error.reason}).") from error
    return checked


def plain(words: str) -> str:
    """A text without what two writings of one question may differ in: case and spaces."""
    return " ".join(words.split()).casefold()


def text(value: Any) -> str:
    """A value as the text that a prompt shows: "" for None, and for NaN, pandas' missing."""
    # NaN and NaT, of whichever library, are what does not equal itself.
    return "" if value is None or value != value else str(value)


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


def _parse(content: str, start: int, where: str) -> tuple[Any, int]:
    """The JSON value that begins at `start`, and where it ends."""
    try:
        return json.JSONDecoder().raw_decode(content, start)
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise UserError(f"{where}: nested too deeply (recursion depth).") from error
    except ValueError as error:  # an integer of more digits than Python reads
        cause = str(error).partition(";")[0]
        raise UserError(f"{where}: broken JSON ({cause}).") from error


def _json_lines(file: Path, columns: tuple[str, ...]) -> Iterator[Found]:
    for number, line in enumerate(_lines(file), start=1):
        if not (content := line.strip()):
            continue
        where = f"{file}, line {number}"
        try:
            record, end = _parse(content, 0, where)
            if end < len(content):
                raise json.JSONDecodeError("Extra data", content, end)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: broken JSON ({error.msg}).") from error
        yield f"line {number}", _object(record, where), record


def _json(file: Path, columns: tuple[str, ...]) -> Iterator[Found]:
    content = file.read_text(encoding="utf-8-sig")
    place = _skip(content, 0)
    try:
        if content.startswith("[", place):
            yield from _array(content, place + 1, file)
            return
        line = 1 + content.count("\n", 0, place)
        one, end = _parse(content, place, f"{file}, line {line}")
        if _skip(content, end) == len(content):
            values = one.values() if isinstance(one, dict) else [[]]
            if any(isinstance(value, (dict, list)) for value in values):
                raise UserError(
                    f"{file}: an array of objects is needed, or one object a line. (A "
                    "single record that holds lists takes brackets: [{...}].)"
                )
            yield "record 1", one, one
            return
    except json.JSONDecodeError as error:
        if content.startswith("[", place):
            raise UserError(
                f"{file}, line {error.lineno}: broken JSON ({error.msg})."
            ) from error
    yield from _json_lines(file, columns)  # one object a line, under the other suffix


def _array(content: str, place: int, file: Path) -> Iterator[Found]:
    """The objects of an array, one by one, so that a fault has a record's number."""
    place, number = _skip(content, place), 0
    while number or not content.startswith("]", place):
        number += 1
        where = f"{file}, record {number}"
        record, place = _parse(content, place, where)
        yield f"record {number}", _object(record, where), record
        place = _skip(content, place)
        if not content.startswith(",", place):
            break
        place = _skip(content, place + 1)
    if not content.startswith("]", place):
        raise json.JSONDecodeError("Expecting ',' delimiter", content, place)
    if (end := _skip(content, place + 1)) < len(content):
        raise json.JSONDecodeError("Extra data", content, end)


def _skip(content: str, place: int) -> int:
    """The place of the next character that is no white space."""
    return SPACE.match(content, place).end()


def _object(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise UserError(f"{where}: an object with named columns is needed.")
    return record


def _csv(file: Path, columns: tuple[str, ...]) -> Iterator[Found]:
    csv.field_size_limit(2**30)  # the default is shorter than many a document
    lines = _lines(file)
    first = next(lines, "")
    told = re.fullmatch(r"sep=(.)[\r\n]*", first)  # as Excel tells and reads it
    rest = lines if told else chain([first], lines)
    reader = csv.reader(rest, delimiter=told[1] if told else ",", strict=True)

    def line() -> int:
        return reader.line_num + bool(told)

    try:
        header = next(filter(None, reader), [])
        _check_header(header, columns, file)
        named = len(header)
        while named and not header[named - 1].strip():
            named -= 1
        for row in filter(None, reader):
            if len(row) != len(header):
                raise UserError(
                    f"{file}, line {line()}: not as many fields as the header has "
                    f"({len(header)})."
                )
            if any(field.strip() for field in row[named:]):
                raise UserError(
                    f"{file}, line {line()}: a field beyond the header's last name, "
                    f"{header[named - 1]!r}."
                )
            yield f"line {line()}", dict(zip(header, row, strict=True)), header
    except csv.Error as error:
        raise UserError(f"{file}, line {line()}: broken CSV ({error}).") from error


def _check_header(names: Sequence[str], columns: tuple[str, ...], file: Path) -> None:
    if twice := [column for column in columns if names.count(column) > 1]:
        raise UserError(f"{file}: two columns have the name {twice[0]!r}.")
    other = re.search(r"[;\t|]", names[0]) if len(names) == 1 else None
    if other and names[0] not in columns:
        raise UserError(
            f"{file}: {lacks(list(columns), names)} Its columns seem to be separated by "
            f"{other[0]!r}: separate them by commas, or put a first line sep={other[0]}"
        )


def _parquet(file: Path, columns: tuple[str, ...]) -> Iterator[Found]:
    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        _check_header(names, columns, file)
        wanted = [column for column in columns if column in names]
        if not wanted and table.metadata.num_rows:
            yield "record 1", {}, names
        for batch in table.iter_batches(BATCH, columns=wanted):
            for record in batch.to_pylist():
                number += 1
                yield f"record {number}", record, names
    except UnicodeDecodeError:
        raise
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise UserError(
            f"{file}: broken parquet, after record {number} ({error})."
        ) from error


READERS = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".csv": _csv,
    ".parquet": _parquet,
    ".ndjson": _json_lines,
}
