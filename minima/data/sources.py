"""Readers of texts or whole records from plain text, JSON, parquet, Hugging Face datasets and minima's own assets."""

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from minima.assets import CHATS, read_chat_asset, read_text_asset
from minima.data.documents import Rejected
from minima.data.parts.share import Share
from minima.data.records import field_of, no_column, read_dataset
from minima.errors import DataError
from minima.recipe.data import Source

_FORMATS = {
    ".txt": "text", ".text": "text", ".md": "text",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json",
    ".parquet": "parquet",
}  # fmt: skip
_OF_RECORDS = ("jsonl", "json", "parquet")
_PARQUET_ROWS, _PARQUET_BYTES = 1024, 1 << 24  # read at once, whichever is less; rows may be whole books
_UNPACKED_BYTES = 1 << 20
_SNIFF_BYTES = 1 << 12
T = TypeVar("T")


def _open_zstd(path: Path, mode: str) -> IO[bytes]:
    import pyarrow

    return cast(IO[bytes], io.BufferedReader(pyarrow.input_stream(path, compression="zstd"), _UNPACKED_BYTES))


_UNPACK: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": _open_zstd}


def read_source(source: Source, rejected: Rejected, *, share: Share | None = None) -> Iterator[str]:
    """The texts of a source, always in the same order.

    Args:
        rejected: counts the records that are not text, which are left out.
        share: read only the records of this share; all if not given.

    Raises:
        DataError: the source is missing, cannot be opened, or has no text.
    """
    share = share or Share()
    texts = _texts(_read(source, source.field, rejected, share), rejected)
    yield from some(texts, source, rejected, f"that `field: {source.field}` names the text", share)


def read_records(source: Source, rejected: Rejected, share: Share) -> Iterator[tuple[str, Any]]:
    """The whole records of a source, each with its place: file and line, or source and row.

    Args:
        source: gives location and format; its `field` is ignored.
        rejected: collects the records that cannot be decoded.
        share: read only the records of this share.

    Raises:
        DataError: the source is missing or cannot be opened.
    """
    return _read(source, None, rejected, share)


def some(items: Iterator[T], source: Source, rejected: Rejected, check: str, share: Share) -> Iterator[T]:
    """The first `max_documents` of a source's items.

    Raises:
        DataError: there are none. A share may have none, because other parts have them.
    """
    found = False
    for item in islice(items, source.max_documents):
        found = True
        yield item
    if not found and share.whole:
        raise no_document(source, rejected, check)


def no_document(source: Source, rejected: Rejected, check: str) -> DataError:
    """The error for a source that has no usable document."""
    return DataError(
        f"source {source.label!r} holds no document: {rejected.describe()}",
        "there is nothing in it to train on",
        f"check its files, that their format is right, and {check}",
    )


def _read(source: Source, field: str | None, rejected: Rejected, share: Share) -> Iterator[tuple[str, Any]]:
    """The field of each record, or the records themselves if `field` is None."""
    if source.embedded is not None:
        return (record for number, record in enumerate(_embedded(source.embedded)) if share.mine(number))
    if source.hub is not None:
        return read_dataset(source, field, rejected, share)
    return _read_files(source, field, rejected, share)


def _embedded(name: str) -> Iterator[tuple[str, Any]]:
    if name in CHATS:
        return ((f"{name}:{number}", record) for number, record in enumerate(read_chat_asset(name), 1))
    return ((f"{name}:{record['id']}", record["text"]) for record in read_text_asset(name))


def _texts(records: Iterator[tuple[str, Any]], rejected: Rejected) -> Iterator[str]:
    """The fields that are text; the others are rejected."""
    for where, value in records:
        if not isinstance(value, str):
            rejected.add("not_text", where, value)
        elif not value.strip():
            rejected.add("empty", where, value)
        elif not value.isascii() and not _is_unicode(value):  # JSON can contain half of a surrogate pair
            rejected.add("not_utf8", where, value)
        else:
            yield value


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


# -- files -------------------------------------------------------------------------------------------------------


def _read_files(source: Source, field: str | None, rejected: Rejected, share: Share) -> Iterator[tuple[str, Any]]:
    readers = {"text": _read_text, "json": _read_json, "jsonl": _read_jsonl, "parquet": _read_parquet}
    known = 0
    files = find_files(source)
    share.begin(len(files))
    for number, path in enumerate(files):
        name = source.format if source.format != "auto" else _format(path)
        known += name is not None
        if not share.open(number):
            continue
        if name is None:
            if share.mine(0):
                rejected.add("unknown_suffix", str(path), path.name)
            continue
        try:
            yield from readers[name](path, field, rejected, share)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise DataError(
                f"{path} cannot be read: {error}",
                "silently leaving it out would train on less text than the recipe says",
                "repair or remove the file",
            ) from error
    if not known:
        raise DataError(
            f"none of {len(files)} files at {source.path!r} has a known suffix, for example {files[0].name!r}",
            "the suffix determines the format",
            f"give `format:` (text, jsonl or parquet), or files that end in {', '.join(_FORMATS)} "
            f"({', '.join(_UNPACK)} too)",
        )


def find_files(source: Source) -> list[Path]:
    """The files of a source's `path` in reading order, without the dataset card (README.md) of a folder of records.

    Raises:
        DataError: there are none, or the path is a folder written by `datasets`.
    """
    files = source.files()
    folder = Path(source.path or "").expanduser()
    saved = {folder / "dataset_dict.json"}, {folder / "dataset_info.json", folder / "state.json"}
    if any(names <= set(files) for names in saved):
        raise DataError(
            f"{source.path!r} is a folder written by `save_to_disk` of datasets",
            "its files cannot be read as texts or records",
            f"read it as a dataset: `hub: {source.path}` instead of `path:`",
        )
    if any(_format(path) in _OF_RECORDS for path in files):
        files = [path for path in files if path != folder / "README.md"]
    if not files:
        raise DataError(
            f"no file at {source.path!r} (relative to {Path.cwd()})",
            "a source without text would silently change the mixture",
            "correct the path, or remove the source",
        )
    return files


def _format(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _UNPACK:
        suffixes.pop()
    return _FORMATS.get(suffixes[-1]) if suffixes else None


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], _UNPACK.get(path.suffix.lower(), open)(path, "rb"))


def _read_text(path: Path, field: str | None, rejected: Rejected, share: Share) -> Iterator[tuple[str, Any]]:
    if not share.mine(0):
        return
    with _open(path) as file:
        content = file.read()
    try:
        yield str(path), content.decode("utf-8-sig")
    except UnicodeDecodeError:
        rejected.add("not_utf8", str(path), content)


def _read_json(path: Path, field: str | None, rejected: Rejected, share: Share) -> Iterator[tuple[str, Any]]:
    """A file that is one array of records; any other is read as JSON lines, which also use that suffix."""
    with _open(path) as file:
        is_array = file.read(_SNIFF_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    records = None
    if is_array:
        with _open(path) as file, suppress(ValueError, RecursionError):
            records = json.loads(file.read().decode("utf-8-sig"))
    if not isinstance(records, list):
        yield from _read_jsonl(path, field, rejected, share)
        return
    for number, record in enumerate(records, 1):
        if not share.mine(number - 1):
            continue
        yield from field_of(record, field, f"{path}:{number}", rejected)


def _read_jsonl(path: Path, field: str | None, rejected: Rejected, share: Share) -> Iterator[tuple[str, Any]]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not share.mine(number - 1):
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                rejected.add("not_utf8", where, line)
                continue
            except (ValueError, RecursionError):
                rejected.add("broken_json", where, line)
                continue
            yield from field_of(record, field, where, rejected)


def _read_parquet(path: Path, field: str | None, rejected: Rejected, share: Share) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if field is not None and field not in file.schema_arrow.names:
                raise no_column(str(path), field, file.schema_arrow.names)
            row = 0
            columns = None if field is None else [field]
            facts = file.metadata
            size = sum(facts.row_group(number).total_byte_size for number in range(facts.num_row_groups))
            at_once = min(_PARQUET_ROWS, max(1, _PARQUET_BYTES * facts.num_rows // max(1, size)))
            for batch in file.iter_batches(batch_size=at_once, columns=columns):
                rows = range(row, row + batch.num_rows)
                row += batch.num_rows
                if any(share.mine(number) for number in rows):  # converting rows to Python objects is slow
                    values = batch.to_pylist() if field is None else batch.column(0).to_pylist()
                    for number, value in zip(rows, values, strict=True):
                        if share.mine(number):
                            yield f"{path}:{number + 1}", value
    except pyarrow.ArrowInvalid as error:
        raise DataError(
            f"{path} is not a complete parquet file: {error}",
            "silently leaving it out would train on less text than the recipe says",
            "copy it again, or remove it",
        ) from error
