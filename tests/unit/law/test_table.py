"""The table of a study: both formats hold the same rows, and every bad cell is named."""

import math
from dataclasses import replace

import numpy as np
import pytest

from minima.errors import TableError
from minima.law.table import COLUMNS, Row, read_table, write_table

ROW = Row(
    study="s", family="f", vocabulary_size=512, student="s1", student_parameters=150_000,
    student_non_embedding_parameters=100_000, teacher="t1", teacher_parameters=350_000,
    teacher_non_embedding_parameters=250_000, initialisation="random", tokens=10_000_000_000_000_001,
    unique_tokens=500_000, epochs=2.5, seed=0, student_loss=3.1000000000000001, flops=1e12,
)  # fmt: skip
DIRECT = replace(
    ROW, teacher="", teacher_parameters=None, teacher_non_embedding_parameters=None, initialisation="direct"
)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_rows_come_back_as_they_were(tmp_path, suffix):
    path = tmp_path / f"table.{suffix}"
    write_table([ROW, DIRECT, replace(ROW, student_loss=None)], path)
    assert read_table(path) == [ROW, DIRECT, replace(ROW, student_loss=None)]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_nan_comes_back_as_one(tmp_path):
    paths = tmp_path / "table.csv", tmp_path / "table.parquet"
    write_table([replace(ROW, student_loss=math.nan)], *paths)
    assert all(math.isnan(read_table(path)[0].student_loss) for path in paths)


def test_numbers_of_numpy_are_written_as_numbers(tmp_path):
    paths = tmp_path / "table.csv", tmp_path / "table.parquet"
    write_table([replace(ROW, student_loss=np.float64(3.25), seed=np.int64(7))], *paths)
    assert [read_table(path) for path in paths] == [[replace(ROW, student_loss=3.25, seed=7)]] * 2


def changed(tmp_path, column, cell):
    """A table whose only row has `cell` in `column`."""
    path = tmp_path / "table.csv"
    write_table([ROW], path)
    cells = dict(zip(COLUMNS, path.read_text().splitlines()[1].split(","), strict=True)) | {column: cell}
    path.write_text(",".join(cells) + "\n" + ",".join(cells.values()) + "\n")
    return path


@pytest.mark.parametrize(
    ("column", "cell"),
    [("student_loss", "low"), ("seed", "0.5"), ("tokens", "1M"), ("initialisation", "pruned"), ("tokens", "inf")],
)
def test_a_cell_of_another_kind_is_named(tmp_path, column, cell):
    with pytest.raises(TableError, match=f"row 1: {column}"):
        read_table(changed(tmp_path, column, cell))


@pytest.mark.parametrize(("cell", "value"), [("1e6", 1_000_000), ("1000000.0", 1_000_000), (" ", None), ("nan", None)])
def test_whole_numbers_may_be_written_as_floats(tmp_path, cell, value):
    assert read_table(changed(tmp_path, "tokens", cell))[0].tokens == value


def test_a_missing_column_is_named_and_a_further_one_is_left_out(tmp_path):
    path = changed(tmp_path, "colour", "red")
    assert read_table(path) == [ROW]
    path.write_text(path.read_text().replace("unique_tokens", "distinct_tokens"))
    with pytest.raises(TableError, match="no column unique_tokens"):
        read_table(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("table.csv", None, "cannot be read"),
        ("table.parquet", None, "cannot be read"),
        ("table.parquet", "no parquet", "cannot be read"),
        ("table.txt", "x", "in neither .csv nor .parquet"),
        ("table.csv", ",".join(COLUMNS) + "\n", "has no rows"),
        ("table.csv", ",".join(COLUMNS) + "\n1,2\n", "row 1 does not have as many cells"),
    ],
)
def test_a_file_that_is_no_table_is_named(tmp_path, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(TableError, match=message):
        read_table(path)
