"""Teachers that are not ordered by their size are named."""

from dataclasses import replace

import pytest

from minima.law.fit.checks import check_rows
from minima.law.fit.teachers import order_notes
from tests.law_tables import row


def runs(losses):
    """Teachers of 200M, 400M and 800M by the losses of their seeds."""
    rows = [
        row(100e6, size, seed, 3.0, teacher_loss=loss)
        for size, own in zip((200e6, 400e6, 800e6), losses, strict=True)
        for seed, loss in enumerate(own)
    ]
    return check_rows(rows, "non_embedding")[0]


def test_ordered_teachers_need_no_note():
    assert order_notes(runs([(3.00, 3.01), (2.90, 2.91), (2.80, 2.81)])) == []


@pytest.mark.parametrize("last", [(2.90, 2.91), (2.95, 2.96), (2.89, 2.90)])
def test_teachers_nearer_than_two_deviations_are_named(last):
    (note,) = order_notes(runs([(3.00, 3.01), (2.90, 2.91), last]))
    assert "the losses of teachers t400M and t800M, 2.9050" in note
    assert "two seed deviations (0.0071)" in note


def test_with_one_seed_only_the_order_counts():
    assert order_notes(runs([(3.0,), (2.9,), (2.89,)])) == []
    assert len(order_notes(runs([(3.0,), (2.9,), (2.91,)]))) == 1


def test_teachers_without_losses_are_left_out():
    assert order_notes(runs([(None,), (None,), (None,)])) == []


def test_studies_may_call_teachers_of_other_sizes_the_same():
    rows = [
        replace(row(100e6, size, 1, 3.0, teacher_loss=loss), study=study, teacher=name)
        for study, sizes in {"a": {"x": 200e6, "y": 400e6}, "b": {"x": 800e6, "y": 400e6}}.items()
        for (name, size), loss in zip(sizes.items(), (3.0, 2.9) if study == "a" else (2.9, 3.0), strict=True)
    ]
    assert order_notes(check_rows(rows, "non_embedding")[0]) == []
