"""Which teacher to choose for a student: what each law answers, with warnings where an answer is unreliable.

FLOPs are 6 N_S D for the student's training and 2 N_T D for the teacher's forward passes; training the teacher is not
included. The original code counts its runs in the same way, with all parameters.
"""

import math
from collections.abc import Sequence

import numpy as np

from minima.errors import TableError
from minima.law.answers import Answer, Cost, Question, Recommendation
from minima.law.fit.curves import describe
from minima.law.fit.fitting import ConditionFit, Fit, ScalingFit
from minima.law.fit.interpolate import Interval, interval
from minima.law.fit.line import (
    ENOUGH_DRAWS,
    MILLION,
    PAPER_TEACHERS,
    SMALLEST_PAPER_STUDENT,
    paper_teacher,
    prediction_interval,
)
from minima.law.fit.scaling import (
    LARGEST_RATIO,
    PUBLISHED,
    PUBLISHED_ERROR,
    PUBLISHED_SIZES,
    PUBLISHED_TOKENS,
    ScalingLaw,
)
from minima.law.sizes_text import short
from minima.pruning.target import width_percent

PUBLISHED_GAP, PUBLISHED_SCALING = "capacity gap, published", "distillation scaling, published"
DISAGREEMENT = 1.5  # factor between two teachers; intervals of measured minima are seldom narrower
FLAT_NATS = 0.01  # a teacher this close to the minimum is as good: about the seed noise of a small study
_NEAR = 1.1  # factor within which a token budget counts as the measured one


def recommend(question: Question, fit: Fit | None = None) -> Recommendation:
    """The teacher to choose under each law.

    Raises:
        TableError: a teacher that is asked for is not larger than the student.
    """
    for teacher in question.teachers:
        if teacher <= question.student:
            raise TableError(
                f"a teacher of {short(teacher)} for a student of {short(question.student)}",
                "the laws are about teachers that are larger than their students",
                "leave it out of --teachers",
            )
    answers, warnings = [_published_gap(question)], []
    if question.tokens is None:
        warnings.append(
            "without --tokens, only the paper's law answers: the other laws, like the best teacher itself, depend on "
            "the training tokens"
        )
    else:
        answers.append(_published_scaling(question, question.tokens))
        for one in fit.conditions if fit else ():
            answers.append(_fitted_gap(question, question.tokens, one, fit))
        if fit is not None:
            warnings.append(f"the fit counts sizes {fit.kind}, so --student and --teachers must, too")
        for scaling in fit.scaling if fit else ():
            answers.append(_fitted_scaling(question, question.tokens, scaling))
    warnings += [f"{answer.law}: {note}" for answer in answers for note in answer.notes]
    found = [answer for answer in answers if answer.teacher is not None]
    chosen = [answer.teacher for answer in found if answer.teacher is not None]
    apart = max(chosen, default=1.0) / min(chosen, default=1.0)
    if apart > DISAGREEMENT or (apart > 1.0 and question.teachers and _matters(question, found)):
        said = "; ".join(f"{answer.law}: {short(answer.teacher or 0)}" for answer in found)
        warnings.append(f"the laws disagree ({said}): measure it on your own data with `minima law study`")
    costs = tuple(_cost(question, teacher) for teacher in question.teachers)
    return Recommendation(question, tuple(answers), costs, tuple(warnings))


def _matters(question: Question, found: Sequence[Answer]) -> bool:
    """Whether the teachers chosen among the available ones differ by more than the flat bottom of a law."""
    places = [question.teachers.index(answer.teacher) for answer in found if answer.teacher in question.teachers]
    losses = [[answer.losses[place] for place in places] for answer in found if answer.losses]
    return not losses or any(max(each) - min(each) > FLAT_NATS for each in losses)


def _cost(question: Question, teacher: float) -> Cost:
    sparsity = 100.0 * (1.0 - question.student / teacher)
    per_token = 6.0 * question.student + 2.0 * teacher
    flops = None if question.tokens is None else per_token * question.tokens
    return Cost(teacher, teacher / question.student, sparsity, width_percent(sparsity), per_token, flops)


def _gap_answer(
    question: Question, law: str, ideal: float | None, ends: Interval | None, measured: str, notes: list[str],
    by: tuple[str, ScalingLaw, float] | None,
) -> Answer:  # fmt: skip
    """`by` is the law that predicts losses: its name, the law, and its relative error."""
    if ideal is not None and ideal <= question.student:
        notes.append("its teacher is not larger than the student, so it has no answer")
        ideal = None
    teacher = ideal
    if ideal is not None and question.teachers:
        teacher = min(question.teachers, key=lambda size: abs(math.log(size / ideal)))
    cost = None if teacher is None else _cost(question, teacher)
    kept = None if ideal is None else ends
    loss, loss_ends, said_by = None, None, ""
    if teacher is not None and question.tokens is not None and by is not None:
        said_by, scaling, error = by
        per_parameter = question.teacher_tokens_per_parameter
        loss = float(scaling.loss_under(question.student, question.tokens, teacher, per_parameter))
        loss_ends = (loss * (1 - error), loss * (1 + error))
    return Answer(
        law=law, teacher=teacher, teacher_interval=kept, ideal=ideal, loss=loss, loss_interval=loss_ends,
        loss_law=said_by, cost=cost, measured=measured, notes=tuple(notes),
    )  # fmt: skip


def _published_gap(question: Question) -> Answer:
    ideal: float | None = paper_teacher(question.student)
    notes: list[str] = []
    low, high = PAPER_TEACHERS
    if question.student <= SMALLEST_PAPER_STUDENT:
        notes.append(f"it has a teacher only for students of more than {short(SMALLEST_PAPER_STUDENT)}")
        ideal = None
    elif not low <= (ideal or 0) <= high:
        notes.append(f"T* = {short(ideal or 0)} extrapolates: its teachers were {short(low)} to {short(high)}")
    measured = f"teachers of {short(low)} to {short(high)}"
    by = (PUBLISHED_SCALING, PUBLISHED, PUBLISHED_ERROR)
    return _gap_answer(question, PUBLISHED_GAP, ideal, None, measured, notes, by)


def _fitted_gap(question: Question, tokens: float, one: ConditionFit, fit: Fit | None) -> Answer:
    law = f"capacity gap, fitted: {describe(one.condition, fit.budget if fit else 'tokens')}"
    line = one.line
    if not line.fitted or line.with_intercept is None or line.student_range is None:
        note = f"no line ({len(line.students)} bracketed students), so it has no answer"
        return _gap_answer(question, law, None, None, "nothing", [note], None)
    million = question.student / MILLION
    ideal = (line.with_intercept.slope * million + line.with_intercept.intercept) * MILLION
    draws_B = np.array([(a * million + b) * MILLION for a, b in line.draws])
    notes = []
    if line.used_share is not None and line.used_share < ENOUGH_DRAWS:
        notes.append(
            f"in only {line.used_share:.0%} of the draws over seeds do three students have a minimum, so the line may "
            "be due to chance"
        )
    low, high = line.student_range
    if not low <= question.student <= high:
        notes.append(
            f"a student of {short(question.student)} extrapolates: the measured range is {short(low)} to {short(high)}"
        )
    own = one.condition.budget if fit is None or fit.budget == "tokens" else one.condition.budget * question.student
    if not own / _NEAR <= tokens <= own * _NEAR:
        notes.append(f"{short(tokens)} tokens extrapolate: it was measured with {short(own)}")
    measured = f"students of {short(low)} to {short(high)}"
    through = [
        (float(minimum.student_size), minimum.teacher_size)
        for minimum in one.minima
        if minimum.student in line.students and minimum.teacher_size is not None
    ]
    low_end, high_end = prediction_interval(line.with_intercept, through, question.student)
    ends: Interval = (max(low_end, question.student), high_end)  # no teacher is smaller than its student
    if len(draws_B):
        ends = _hull(ends, interval(draws_B))
    return _gap_answer(question, law, ideal, ends, measured, notes, _own_scaling(fit, one))


def _hull(one: Interval, other: Interval) -> Interval:
    (low, high), (other_low, other_high) = one, other
    lowest = None if low is None or other_low is None else min(low, other_low)
    return lowest, (None if high is None or other_high is None else max(high, other_high))


def _own_scaling(fit: Fit | None, one: ConditionFit) -> tuple[str, ScalingLaw, float] | None:
    condition = one.condition
    for scaling in fit.scaling if fit else ():
        same = (scaling.study, scaling.family, scaling.initialisation)
        if same == (condition.study, condition.family, condition.initialisation) and scaling.law is not None:
            return _scaling_name(scaling), scaling.law, scaling.distilled.largest_error or 0.0
    return None


def _scaling_name(scaling: ScalingFit) -> str:
    return f"distillation scaling, fitted: {scaling.name}"


def _published_scaling(question: Question, tokens: float) -> Answer:
    low, high = PUBLISHED_SIZES
    notes = []
    if not low <= question.student <= high:
        notes.append(
            f"a student of {short(question.student)} extrapolates: the measured range is {short(low)} to {short(high)}"
        )
    if tokens > PUBLISHED_TOKENS:
        notes.append(f"{short(tokens)} tokens extrapolate: at most {short(PUBLISHED_TOKENS)} were measured")
    measured = f"sizes of {short(low)} to {short(high)}, up to {short(PUBLISHED_TOKENS)} tokens"
    return _scaling_answer(question, tokens, PUBLISHED_SCALING, PUBLISHED, PUBLISHED_ERROR, measured, high, notes)


def _fitted_scaling(question: Question, tokens: float, scaling: ScalingFit) -> Answer:
    law = _scaling_name(scaling)
    known, part = scaling.law, scaling.distilled
    if known is None or part.student_range is None or part.token_range is None:
        missing = scaling.distilled if not scaling.distilled.fitted else scaling.supervised
        note = f"not fitted ({missing.reason})"
        return Answer(law=law, measured="nothing", notes=(note,))
    notes = [part.reason] if part.reason else []
    for what, value, ends in (
        ("a student of", question.student, part.student_range),
        ("training tokens of", tokens, part.token_range),
    ):
        if not ends[0] <= value <= ends[1]:
            notes.append(
                f"{what} {short(value)} extrapolates: the measured range is {short(ends[0])} to {short(ends[1])}"
            )
    sizes, budgets = (" to ".join(short(end) for end in ends) for ends in (part.student_range, part.token_range))
    measured = f"students of {sizes}, {budgets} tokens"
    return _scaling_answer(question, tokens, law, known, part.largest_error or 0.0, measured, None, notes, part)


def _scaling_answer(
    question: Question, tokens: float, law: str, scaling: ScalingLaw, error: float, measured: str,
    largest: float | None, notes: list[str], part=None,
) -> Answer:  # fmt: skip
    student, per_parameter = question.student, question.teacher_tokens_per_parameter

    def loss_under(teacher):
        return scaling.loss_under(student, tokens, teacher, per_parameter)

    ideal = scaling.best_teacher(student, tokens, per_parameter)
    if ideal is None:
        notes.append(f"the loss still falls at a teacher {LARGEST_RATIO:,.0f} times as large, so there is no best one")
    teacher = min(question.teachers, key=loss_under) if question.teachers else ideal
    flat = None
    if ideal is not None:
        grid_G = student * np.exp(np.linspace(0.0, math.log(LARGEST_RATIO), 400))
        inside_G = grid_G[loss_under(grid_G) <= loss_under(ideal) + FLAT_NATS]
        flat = (float(inside_G[0]), float(inside_G[-1])) if inside_G.size else (ideal, ideal)
    loss = None if teacher is None else float(loss_under(teacher))
    alone = float(scaling.supervised.loss(student, tokens))
    if loss is not None and alone < loss:
        notes.append(
            f"without a teacher the student would reach {alone:.3f} on these tokens, which are so many that this "
            "teacher has nothing left to teach a student that starts from random weights"
        )
    if teacher is not None and largest is not None and teacher > largest:
        notes.append(f"a teacher of {short(teacher)} extrapolates: the largest measured is {short(largest)}")
    if teacher is not None and part is not None and part.teacher_loss_range is not None:
        own, (low, high) = float(scaling.teacher_loss(teacher, per_parameter)), part.teacher_loss_range
        if not low <= own <= high:
            notes.append(f"a teacher loss of {own:.3f} extrapolates: the measured range is {low:.3f} to {high:.3f}")
    ends = None if loss is None else (loss * (1 - error), loss * (1 + error))
    cost = None if teacher is None else _cost(question, teacher)
    losses = tuple(float(loss_under(size)) for size in question.teachers)
    return Answer(
        law=law, teacher=teacher, ideal=ideal, loss=loss, loss_interval=ends, loss_law=law, flat=flat, cost=cost,
        losses=losses, measured=measured, notes=tuple(notes), alone=alone,
    )  # fmt: skip
