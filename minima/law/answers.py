"""The parts of a recommendation: the question, each law's answer, and the cost of a teacher."""

from dataclasses import dataclass

from minima.law.fit.interpolate import Interval


@dataclass(frozen=True)
class Cost:
    """What a teacher costs for a student."""

    teacher: float  # its parameters
    ratio: float  # teacher size over student size
    sparsity_percent: float  # percent of the teacher's parameters that pruning it to the student removes
    # percent of heads, neurons and width that this removes of each, since it cuts both dimensions of a matrix
    width_percent: int
    flops_per_token: float  # FLOPs per token of the distillation
    flops: float | None  # FLOPs of the whole distillation; None without a token budget


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer of one law."""

    law: str
    # size of the best teacher, in parameters, among those asked for if there are any; None if the law has no answer
    teacher: float | None = None
    # interval of the law's own best teacher: the hull of the one over seeds and the one from the scatter of the
    # students around their line; None if not known
    teacher_interval: Interval | None = None
    ideal: float | None = None  # the law's own best teacher, whatever was asked for; None if it has none
    # expected loss of the student under `teacher`, nats per token; None without a token budget, a teacher, or a law
    # that predicts it
    loss: float | None = None
    loss_interval: Interval | None = None  # its interval, from the relative error of the law that predicts it
    # the law that predicts it. A line says nothing about losses: for the published line, the published scaling law
    # does; for a fitted line, the scaling law that was fitted to the same runs, if there is one
    loss_law: str = ""
    # teachers between which the loss is within 0.01 nats of the lowest; None without losses
    flat: tuple[float, float] | None = None
    cost: Cost | None = None  # cost of using `teacher`
    losses: tuple[float, ...] = ()  # losses under each teacher asked for, in their order
    measured: str  # the range in which the law was measured
    notes: tuple[str, ...] = ()  # warnings about this answer
    # expected loss of the same student on the same tokens without a teacher, from random weights; None if the law does
    # not predict it
    alone: float | None = None


@dataclass(frozen=True)
class Question:
    """The question: sizes in parameters, tokens of the distillation (None: not known), the available teachers (empty:
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
