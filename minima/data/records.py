"""Fields of records, and the records of Hugging Face datasets."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minima.data.documents import Rejected
from minima.data.parts.share import Share
from minima.errors import DataError, first_line
from minima.recipe.data import Source


def field_of(record: Any, field: str | None, where: str, rejected: Rejected) -> Iterator[tuple[str, Any]]:
    """A record's field (the whole record if `field` is None) with its place; a record without the field is rejected."""
    if field is None:
        yield where, record
    elif not isinstance(record, dict):
        rejected.add("not_a_record", where, record)
    elif field not in record:
        rejected.add("missing_field", where, record)
    else:
        yield where, record[field]


def no_column(where: str, field: str, columns: list[str]) -> DataError:
    """The error for a table without the requested column."""
    return DataError(
        f"{where} has no column {field!r}; it has {', '.join(columns)}",
        "so none of its records has text under that name",
        "set the source's `field:` to the column that holds the text",
    )


def read_dataset(source: Source, field: str | None, rejected: Rejected, share: Share) -> Iterator[tuple[str, Any]]:
    """A field (or all) of each of a share's records in a Hugging Face dataset.

    Raises:
        DataError: the dataset cannot be opened or read, or has no such column.
    """
    assert source.hub is not None
    # `datasets` raises its own errors and those of pyarrow, the network and fsspec, so we catch everything
    try:
        dataset = _load_dataset(source)
    except Exception as error:
        raise _unreadable(source, "cannot be opened", error) from error
    columns = dataset.column_names
    if columns is not None and field is not None:
        if field not in columns:
            raise no_column(f"dataset {source.hub!r}", field, columns)
        dataset = dataset.select_columns([field])
    row = 0
    try:
        for row, record in enumerate(dataset, 1):
            if share.mine(row - 1):
                yield from field_of(record, field, f"{source.hub}:{row}", rejected)
    except Exception as error:
        raise _unreadable(source, f"cannot be read after row {row}", error) from error


def _unreadable(source: Source, how: str, error: Exception) -> DataError:
    return DataError(
        f"dataset {source.hub!r} (config {source.config}, split {source.split}) {how}: {first_line(error)}",
        "its text is part of the mixture",
        "check its name, configuration and split, and that this machine can reach the Hub; or download it and use the "
        "folder",
    )


def _load_dataset(source: Source) -> Any:
    import datasets

    assert source.hub is not None
    folder = Path(source.hub).expanduser()
    if (folder / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(str(folder))
        if source.split not in splits:
            raise ValueError(f"it has no split {source.split!r} but {', '.join(map(str, splits))}")
        saved = splits[source.split]
    elif (folder / "state.json").is_file():
        saved = datasets.load_from_disk(str(folder))
    else:
        name = str(folder) if folder.is_dir() else source.hub
        return datasets.load_dataset(
            name, source.config, split=source.split, revision=source.revision, streaming=source.streaming
        )
    return saved.to_iterable_dataset() if source.streaming else saved
