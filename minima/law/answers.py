"""What a recommendation is made of: the question, each law's answer, and the price of a teacher."""

from dataclasses import dataclass

from minima.law.interpolate import Interval


@dataclass(frozen=True)
class Cost:
    """What a teacher means for a student.

    Attributes:
        teacher: parameters.
        ratio: of teacher to student.
        sparsity_percent: of the teacher's parameters that pruning it to the student removes.
        width_percent: of heads, neurons and width that it removes each, when both dimensions of a matrix are cut.
        flops_per_token: of the distillation.
        flops: of the whole distillation; None without a token budget.
    """

    teacher: float
    ratio: float
    sparsity_percent: float
    width_percent: int
    flops_per_token: float
    flops: float | None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one law says.

    Attributes:
        law: its name.
        teacher: the best one in parameters, of those asked for where some were; None where it has no answer.
        teacher_interval: of the law's own best teacher, the wider ends of those over seeds and of those from the
            scatter of the students around their line; None where it is not known.
        ideal: the law's own best teacher, whatever was asked for; None where it has none.
        loss: expected of the student under `teacher`, nats per token; None without a token budget, a teacher, or a
            law that says it.
        loss_interval: of it, from the relative error of the law that says it.
        loss_law: the law that says it. A line says nothing about losses: the published scaling law does for the
            published line, and for a fitted line the scaling law that was fitted to the same runs, where there is one.
        flat: teachers between which the loss is within 0.01 nats of the lowest; None without losses.
        cost: of taking `teacher`.
        losses: under each teacher asked for, in their order.
        measured: the range in which the law was measured.
        notes: what to know about this answer; all of them are warnings.
        alone: expected loss of the same student on the same tokens without a teacher, from random weights; None where
            the law does not say it.
    """

    law: str
    teacher: float | None = None
    teacher_interval: Interval | None = None
    ideal: float | None = None
    loss: float | None = None
    loss_interval: Interval | None = None
    loss_law: str = ""
    flat: tuple[float, float] | None = None
    cost: Cost | None = None
    losses: tuple[float, ...] = ()
    measured: str
    notes: tuple[str, ...] = ()
    alone: float | None = None


@dataclass(frozen=True)
class Question:
    """What is asked: sizes in parameters, tokens of the distillation (None: not known), the teachers at hand (empty:
    any), and how many tokens per parameter a teacher is trained on (for the scaling law)."""

    student: float
    tokens: float | None = None
    teachers: tuple[float, ...] = ()
    teacher_tokens_per_parameter: float = 20.0


@dataclass(frozen=True)
class Recommendation:
    """All answers to a question, the cost of each teacher that was asked for, and warnings."""

    question: Question
    answers: tuple[Answer, ...]
    costs: tuple[Cost, ...]
    warnings: tuple[str, ...]
