"""The table that ends a run."""

import pytest

from minima.report.run_table import number, run_table


def row(name, metrics, state="finished", seconds=1.25):
    return {"stage": name, "kind": "k", "state": state, "seconds": seconds, "metrics": metrics}


def test_rows_line_up_and_show_what_counts():
    rows = [
        row("teacher", {"step": 3, "parameters": 2164416, "held_out_loss": 4.51234, "note": "x"}),
        row("quality", {"teacher": {"loss": 4.5}, "student": {"loss": 5.0}}),
        row("minima", {}, "not begun", None),
    ]
    lines = run_table(rows, {"teacher": {"loss": 4.5}, "tokens": 1200, "export": {"minima": "a/b"}}).splitlines()
    assert lines[1].startswith("stage    kind  state      seconds  result")
    assert lines[3] == "teacher  k     finished   1.2      parameters 2,164,416, held_out_loss 4.5123"
    assert lines[4].endswith("2 models, loss 4.5000 to 5.0000")
    assert lines[5] == "minima   k     not begun"
    assert lines[-3:] == ["teacher.loss   4.5000", "tokens         1,200", "export.minima  a/b"]


def test_while_stages_are_left_there_is_no_summary():
    assert "summary" not in run_table([row("a", {})], None)


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234567, "1,234,567"), (0.5, "0.5000"), (0, "0"), (0.0, "0.0000"), (1e-5, "1e-05"), (1e9, "1,000,000,000"),
     (True, "True"), ("a", "a"), (None, "None"), (-2.5, "-2.5000"), (float("inf"), "inf"), (float("nan"), "nan")],
)  # fmt: skip
def test_numbers(value, text):
    assert number(value) == text


def test_a_benchmark_shows_its_scores():
    scores = {"mmlu": {"score": 0.285, "items": 7, "limited": True}, "drop": {"score": 0.5, "limited": False}}
    assert (
        run_table([row("b", scores | {"left_out": ["humaneval"]})], None)
        .splitlines()[-1]
        .endswith("mmlu 28.5 % of 7 items only, drop 50.0 %, no humaneval")
    )
