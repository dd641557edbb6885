"""Check that a table's teachers get better with size: otherwise "larger" would not mean "better"."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from minima.law.fit.checks import Run
from minima.law.fit.curves import with_names

DEVIATIONS = 2.0  # between neighbours; closer ones could swap places with another seed


def order_notes(runs: Sequence[Run]) -> list[str]:
    """Notes on neighbouring teachers whose mean losses do not fall by more than two seed deviations, one line each.

    The deviation is pooled over the teachers of a study and family; with one seed there is none, and only teachers
    that do not get better with size are named.
    """
    families: dict[tuple[str, str], dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    sizes: dict[tuple[str, str, str], int] = {}
    for run in runs:
        if run.teacher and run.teacher_loss is not None:
            families[run.study, run.family][run.teacher][run.seed] = run.teacher_loss
            sizes[run.study, run.family, run.teacher] = run.teacher_size
    notes = []
    for (study, family), teachers in sorted(families.items()):
        ordered = sorted(teachers, key=lambda name: sizes[study, family, name])
        means = {name: float(np.mean(list(teachers[name].values()))) for name in ordered}
        squares = [(loss - means[name]) ** 2 for name in ordered for loss in teachers[name].values()]
        freedom = len(squares) - len(ordered)
        deviation = float(np.sqrt(sum(squares) / freedom)) if freedom else 0.0
        for smaller, larger in pairwise(ordered):
            if means[smaller] - means[larger] <= DEVIATIONS * deviation:
                losses = f"{means[smaller]:.4f} and {means[larger]:.4f}"
                note = f"the losses of teachers {smaller} and {larger}, {losses}, do not fall by more than two seed "
                notes.append(with_names(study, family, f"{note}deviations ({deviation:.4f})"))
    return notes
