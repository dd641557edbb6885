"""Synthetic tables of a study, whose best teachers and noise are known."""

from collections.abc import Callable, Sequence

import numpy as np

from minima.law.table import Row

EMBEDDINGS = 1_000_000  # of every model, so that sizes with and without them differ


def row(student: float, teacher: float | None, seed: int, loss: float, **changes) -> Row:
    """One run; sizes are non-embedding parameters."""
    values = {
        "study": "synthetic", "family": "llama", "vocabulary_size": 32000, "student": f"s{student / 1e6:g}M",
        "student_parameters": round(student) + EMBEDDINGS, "student_non_embedding_parameters": round(student),
        "teacher": "" if teacher is None else f"t{teacher / 1e6:g}M",
        "teacher_parameters": None if teacher is None else round(teacher) + EMBEDDINGS,
        "teacher_non_embedding_parameters": None if teacher is None else round(teacher),
        "initialisation": "direct" if teacher is None else "pruned_from_teacher", "tokens": 10**9,
        "unique_tokens": 10**9, "epochs": 1.0, "seed": seed, "student_loss": float(loss),
    }  # fmt: skip
    return Row(**(values | changes))


def valley(
    students: Sequence[float],
    teachers: Sequence[float],
    seeds: int,
    best: Callable[[float], float],
    *,
    noise: float = 0.0,
    curvature: float = 0.05,
    rng: np.random.Generator | None = None,
    direct: bool = False,
    **changes,
) -> list[Row]:
    """Rows whose loss is a parabola in log teacher size with its lowest point at `best(student)`.

    Args:
        students: non-embedding parameters.
        teachers: non-embedding parameters; only those larger than a student teach it.
        seeds: number of them. A seed moves all of a student's losses by a common amount, ten times the noise.
        best: the best teacher's size of a student.
        noise: standard deviation of one run, nats; the half of its variance is the teacher's and shared by students.
        curvature: of the parabola, nats for a factor of e squared.
        rng: of the noise.
        direct: also runs without a teacher, 0.1 nats above the minimum.
    """  # fmt: skip
    rng = rng or np.random.default_rng(0)
    shared = {(teacher, seed): rng.standard_normal() for teacher in teachers for seed in range(seeds)}
    rows = []
    for student in students:
        floor = 3.0 - 0.1 * np.log(student / 1e8)
        for seed in range(seeds):
            common = 10 * noise * rng.standard_normal()
            for teacher in teachers:
                if teacher > student:
                    away = np.log(teacher / best(student))
                    moved = noise * (shared[teacher, seed] + rng.standard_normal()) / np.sqrt(2)
                    loss = floor + curvature * away**2 + common + moved
                    own = {"teacher_loss": 3.5 - 0.1 * np.log(teacher / 1e8)} | changes
                    rows.append(row(student, teacher, seed, loss, **own))
            if direct:
                rows.append(row(student, None, seed, floor + 0.1 + common))
    return rows
