"""When held-out losses end a run."""

from minima.engine.patience import Patience


def spent_after(limit, losses):
    patience = Patience(limit)
    for step, loss in enumerate(losses, start=1):
        patience.add(step, loss)
        if patience.spent:
            return step, patience.best_step
    return None, patience.best_step


def test_it_ends_after_so_many_in_a_row_that_are_no_better():
    assert spent_after(2, [3.0, 2.0, 2.5, 2.1, 1.0]) == (4, 2)
    assert spent_after(2, [3.0, 2.0, 2.5, 1.9, 2.0, 1.9]) == (6, 4)  # as good is no better
    assert spent_after(1, [3.0, 2.0, 1.0]) == (None, 3)
    assert spent_after(None, [1.0, 2.0, 3.0, 4.0]) == (None, 1)


def test_a_checkpoint_keeps_what_was_seen():
    first, second = Patience(2), Patience(2)
    for step, loss in ((1, 3.0), (2, 2.0), (3, 2.5)):
        first.add(step, loss)
    second.restore(first.state())
    second.add(4, 2.1)
    assert second.spent and (second.best, second.best_step) == (2.0, 2)
