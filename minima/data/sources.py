"""Readers: plain text, JSON lines, parquet, Hugging Face datasets and the embedded texts -> texts."""

import bz2
import glob
import gzip
import json
import lzma
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from minima.assets import read_text_asset
from minima.data.documents import Rejected
from minima.errors import DataError
from minima.recipe.data import Source

_FORMATS = {
    ".txt": "text", ".text": "text", ".md": "text",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
    ".parquet": "parquet",
}  # fmt: skip
_UNPACK = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_PARQUET_ROWS = 1024


def read_source(source: Source, rejected: Rejected) -> Iterator[str]:
    """The texts of a source, in an order that is always the same.

    Args:
        source: says where and in which format.
        rejected: takes what is no text: each such record is counted and left out.

    Raises:
        DataError: the source is missing, cannot be opened, or gives not one text.
    """
    if source.embedded is not None:
        records: Iterator[tuple[str, Any]] = (
            (f"{source.embedded}:{record['id']}", record["text"]) for record in read_text_asset(source.embedded)
        )
    elif source.hub is not None:
        records = _read_dataset(source, rejected)
    else:
        records = _read_files(source, rejected)
    found = False
    for text in islice(_texts(records, rejected), source.max_documents):
        found = True
        yield text
    if not found:
        raise DataError(
            f"source {source.label!r} holds no document: {rejected.describe()}",
            "nothing could be learnt from it",
            f"check its files, that their format is the right one, and that `field: {source.field}` names the text",
        )


def _texts(records: Iterator[tuple[str, Any]], rejected: Rejected) -> Iterator[str]:
    """What is text among the records' fields."""
    for where, value in records:
        if not isinstance(value, str):
            rejected.add("not_text", where, value)
        elif not value.strip():
            rejected.add("empty", where, value)
        elif not value.isascii() and not _is_unicode(value):  # JSON can spell half of a surrogate pair
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


def _read_files(source: Source, rejected: Rejected) -> Iterator[tuple[str, Any]]:
    assert source.path is not None
    readers = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}
    known = 0
    files = find_files(source.path)
    for path in files:
        name = source.format if source.format != "auto" else _format(path)
        if name is None:
            rejected.add("unknown_suffix", str(path), path.name)
            continue
        known += 1
        try:
            yield from readers[name](path, source.field, rejected)
        except (OSError, EOFError, lzma.LZMAError) as error:
            raise DataError(
                f"{path} cannot be read: {error}",
                "leaving it out without a word would train on less text than the recipe says",
                "mend or remove the file",
            ) from error
    if not known:
        raise DataError(
            f"none of {len(files)} files at {source.path!r} has a known suffix, for example {files[0].name!r}",
            "the format is told by the suffix",
            f"give `format:` (text, jsonl or parquet), or files that end in {', '.join(_FORMATS)} (.gz, .xz, .bz2 too)",
        )


def find_files(pattern: str) -> list[Path]:
    """The files of a path: itself, all below a folder, or all that match a pattern; sorted, hidden ones left out.

    Raises:
        DataError: there is none.
    """
    path = Path(pattern).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        below = [file for file in path.rglob("*") if file.is_file()]
        files = [file for file in below if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    else:
        files = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
    if not files:
        raise DataError(
            f"no file at {pattern!r} (looked from {Path.cwd()})",
            "a source without text would silently change the mixture",
            "correct the path, or remove the source",
        )
    return sorted(files, key=lambda file: file.as_posix())


def _format(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _UNPACK:
        suffixes.pop()
    return _FORMATS.get(suffixes[-1]) if suffixes else None


def _open(path: Path) -> IO[bytes]:
    opener: Any = _UNPACK.get(path.suffix.lower(), open)
    return cast(IO[bytes], opener(path, "rb"))


def _read_text(path: Path, field: str, rejected: Rejected) -> Iterator[tuple[str, Any]]:
    with _open(path) as file:
        content = file.read()
    try:
        yield str(path), content.decode("utf-8-sig")
    except UnicodeDecodeError:
        rejected.add("not_utf8", str(path), content)


def _read_jsonl(path: Path, field: str, rejected: Rejected) -> Iterator[tuple[str, Any]]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
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
            yield from _field(record, field, where, rejected)


def _field(record: Any, field: str, where: str, rejected: Rejected) -> Iterator[tuple[str, Any]]:
    if not isinstance(record, dict):
        rejected.add("not_a_record", where, record)
    elif field not in record:
        rejected.add("missing_field", where, record)
    else:
        yield where, record[field]


def _read_parquet(path: Path, field: str, rejected: Rejected) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise _no_column(str(path), field, file.schema_arrow.names)
            row = 0
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield f"{path}:{row}", value
    except pyarrow.ArrowInvalid as error:
        raise DataError(
            f"{path} is not a whole parquet file: {error}",
            "leaving it out without a word would train on less text than the recipe says",
            "copy it again, or remove it",
        ) from error


def _no_column(where: str, field: str, columns: list[str]) -> DataError:
    return DataError(
        f"{where} has no column {field!r}; it has {', '.join(columns)}",
        "no record of it has text under that name",
        "set the source's `field:` to the column that holds the text",
    )


# -- Hugging Face datasets ---------------------------------------------------------------------------------------


def _read_dataset(source: Source, rejected: Rejected) -> Iterator[tuple[str, Any]]:
    assert source.hub is not None
    # `datasets` raises errors of its own, of pyarrow, of the network and of fsspec, so any is caught
    try:
        dataset = _load_dataset(source)
    except Exception as error:
        raise _unreadable(source, "cannot be opened", error) from error
    columns = dataset.column_names
    if columns is not None and source.field not in columns:
        raise _no_column(f"dataset {source.hub!r}", source.field, columns)
    if columns is not None:
        dataset = dataset.select_columns([source.field])
    row = 0
    try:
        for row, record in enumerate(dataset, 1):
            yield from _field(record, source.field, f"{source.hub}:{row}", rejected)
    except Exception as error:
        raise _unreadable(source, f"cannot be read after row {row}", error) from error


def _unreadable(source: Source, how: str, error: Exception) -> DataError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    return DataError(
        f"dataset {source.hub!r} (config {source.config}, split {source.split}) {how}: {reason}",
        "its text is part of the mixture",
        "check its name, configuration and split, and that this machine can reach the Hub; or download it and give "
        "its folder",
    )


def _load_dataset(source: Source) -> Any:
    import datasets

    assert source.hub is not None
    folder = Path(source.hub).expanduser()
    if (folder / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(str(folder))[source.split]
        return saved.to_iterable_dataset() if source.streaming else saved
    if (folder / "state.json").is_file():
        saved = datasets.load_from_disk(str(folder))
        return saved.to_iterable_dataset() if source.streaming else saved
    name = str(folder) if folder.is_dir() else source.hub
    return datasets.load_dataset(
        name, source.config, split=source.split, revision=source.revision, streaming=source.streaming
    )
