"""A fit, and a recommendation, as text for a terminal or a log."""

from collections.abc import Sequence

from minima.law.answers import Answer, Recommendation
from minima.law.fit.curves import describe
from minima.law.fit.fitting import ConditionFit, Fit, ScalingFit
from minima.law.fit.interpolate import MINIMUM, Interval, Minimum
from minima.law.fit.line import (
    ENOUGH_DRAWS,
    PAPER_INTERCEPT,
    PAPER_SLOPE,
    SMALLEST_PAPER_STUDENT,
    LineFit,
    paper_teacher,
)
from minima.law.fit.scaling_fit import Fitted
from minima.law.recommend import FLAT_NATS
from minima.law.sizes_text import short
from minima.report.tables import text_table


def render_fit(fit: Fit) -> str:
    """The whole report: rows left out, minima and line of each condition, and the scaling law."""
    lines = [
        f"{fit.table}: {fit.num_runs} of {fit.num_rows} rows fitted; sizes {fit.kind}; "
        f"95 % intervals over seeds from {fit.num_draws:,} draws (seed {fit.seed})"
    ]
    lines += [f"left out: row {one.row} ({one.run}): {one.reason}" for one in fit.excluded]
    lines += [f"note: {note}" for note in fit.notes]
    for one in fit.conditions:
        lines += ["", describe(one.condition, fit.budget), *_condition(one)]
    lines += ["", "Distillation scaling law (arXiv 2502.08606)"]
    for scaling in fit.scaling:
        lines += _scaling(scaling)
    return "\n".join(lines)


def _condition(one: ConditionFit) -> list[str]:
    headers = ["student", "best teacher", "interval", "T*/S", "loss there", "interval", "draws with one", "alone",
               "seed deviation", "paper's T*"]  # fmt: skip
    rows = []
    for minimum, curve in zip(one.minima, one.curves, strict=True):
        alone = f"{sum(curve.direct.values()) / len(curve.direct):.4f}" if curve.direct else "-"
        rows.append([*_minimum(minimum), alone, _deviation(minimum), _paper(minimum)])
    lines = ["  " + line for line in text_table(rows, headers).splitlines()]
    lines += [f"  {minimum.student}: {_sharpness(minimum)}" for minimum in one.minima]
    return lines + [f"  {line}" for line in _line(one)]


def _minimum(minimum: Minimum) -> list[str]:
    name = f"{minimum.student} ({short(minimum.student_size)})"
    share = "-" if minimum.bracketed_share is None else f"{minimum.bracketed_share:.0%}"
    if minimum.status != MINIMUM or minimum.teacher_size is None:
        return [name, minimum.status, "-", "-", "-", "-", share]
    return [
        name, short(minimum.teacher_size), _sizes_interval(minimum.teacher_interval),
        f"{minimum.teacher_size / minimum.student_size:.2f}", f"{minimum.loss:.4f}",
        _interval(minimum.loss_interval), share,
    ]  # fmt: skip


def _sharpness(minimum: Minimum) -> str:
    if minimum.rises is None:
        return f"{minimum.status}: {minimum.reason}"
    deviation = minimum.noise.deviation
    left, right = minimum.rises
    text = f"parabola through {', '.join(minimum.used)}; above its lowest point: smallest teacher {left:+.4f} nats, "
    text += f"largest {right:+.4f}"
    if deviation:
        text += f" ({left / deviation:.1f} and {right / deviation:.1f} seed deviations)"
    if minimum.misfit_p is not None:
        missed = "misses the means by more than the seeds explain" if minimum.misfit_p < 0.05 else "fits"
        text += f"; the parabola {missed} (p = {minimum.misfit_p:.2g})"
    return text


def _deviation(minimum: Minimum) -> str:
    if minimum.noise.deviation is None:
        return "one seed"
    return f"{minimum.noise.deviation:.4f}{' paired' if minimum.noise.paired else ''}"


def _paper(minimum: Minimum) -> str:
    if minimum.student_size <= SMALLEST_PAPER_STUDENT:
        return "none"
    paper = paper_teacher(minimum.student_size)
    ends = minimum.teacher_interval
    if ends is None:
        return short(paper)
    inside = (ends[0] is None or paper >= ends[0]) and (ends[1] is None or paper <= ends[1])
    return f"{short(paper)} ({'inside' if inside else 'outside'})"


def _line(one: ConditionFit) -> list[str]:
    line = one.line
    left_out = [f"  without {name} ({reason})" for name, reason in line.left_out]
    if not line.fitted or line.with_intercept is None or line.without_intercept is None:
        number = len(line.students)
        number_text = f"{number} bracketed student{'' if number == 1 else 's'}"
        return [f"no line: {number_text}, but a line needs three of different sizes", *left_out]
    lines = [f"line through {', '.join(line.students)}; millions of parameters", *left_out]
    lines += [_equation("T* = a S + b", line.with_intercept), _equation("T* = a S", line.without_intercept)]
    if line.used_share is not None and line.used_share < ENOUGH_DRAWS:
        lines.append(
            f"  only {line.used_share:.0%} of the draws have three bracketed students: no intervals over seeds, since "
            "the remaining draws would be a biased selection"
        )
    agreement = line.agreement
    if agreement is not None:
        verdict = {True: "rejected", False: "not rejected", None: "cannot be tested"}[agreement.rejected]
        seeds, scatter = ("-" if p is None else f"{p:.2g}" for p in (agreement.seeds_p, agreement.scatter_p))
        lines.append(
            f"  the paper's T* = {PAPER_SLOPE} S - {-PAPER_INTERCEPT}: {verdict} (tested: {agreement.test}; p over "
            f"seeds {seeds}, p from the scatter around the line {scatter}; rejected below 0.025 in one of them)"
        )
        if agreement.rejected is False:
            lines.append(f"  with {len(line.students)} students that only rules out large differences")
    return lines


def _equation(form: str, fit: LineFit) -> str:
    parts = [f"a = {fit.slope:.3f} {_two_intervals(fit.slope_interval, fit.slope_scatter_interval)}"]
    if fit.intercept_scatter_interval is not None:
        parts.append(
            f"b = {fit.intercept:.3f} {_two_intervals(fit.intercept_interval, fit.intercept_scatter_interval)}"
        )
    r2 = "-" if fit.r2 is None else f"{fit.r2:.4f}"
    return f"  {form}: {', '.join(parts)}, R2 = {r2}"


def _two_intervals(seeds: Interval | None, scatter: Interval | None) -> str:
    return f"({_interval(seeds, 3)} over seeds, {_interval(scatter, 3)} from the scatter)"


def _scaling(scaling: ScalingFit) -> list[str]:
    lines = [f"  {scaling.name}"]
    for name, part in (("supervised", scaling.supervised), ("distilled", scaling.distilled)):
        lines.append(f"    {name}: {_fitted_text(part)}")
    if scaling.published_error is not None:
        lines.append(
            f"    published coefficients: half of the runs within {scaling.published_error:.1%} of the measured loss"
        )
    return lines


def _fitted_text(part: Fitted) -> str:
    if not part.fitted or part.coefficients is None:
        return f"not fitted: {part.reason}"
    values = ", ".join(f"{name} {value:.4g}" for name, value in vars(part.coefficients).items())
    remark = f" ({part.reason})" if part.reason else ""
    return (
        f"{values}; {part.num_runs} runs, half of them within {part.median_error:.2%}, 95 % within "
        f"{part.largest_error:.2%}{remark}"
    )


def _sizes_interval(ends: Interval | None) -> str:
    if ends is None:
        return "-"
    low, high = (None if end is None else short(end) for end in ends)
    return f"{low or 'beyond the smallest'} to {high or 'beyond the largest'}"


def _interval(ends: Sequence[float | None] | None, digits: int = 4) -> str:
    if ends is None:
        return "-"
    return " to ".join("open" if end is None else f"{end:.{digits}f}" for end in ends)


def render_recommendation(found: Recommendation) -> str:
    """The text: a table of answers, one of the teachers that were asked for, and the warnings."""
    question = found.question
    tokens = "an unknown number of" if question.tokens is None else short(question.tokens)
    lines = [f"student of {short(question.student)}, {tokens} tokens"]
    per_token = question.tokens is None
    flops = "FLOPs per token" if per_token else "FLOPs"
    headers = ["law", "teacher", "interval", "T/S", "expected loss", "interval", flops, "pruning"]
    rows = [_answer(answer, per_token) for answer in found.answers]
    lines += text_table(rows, headers).splitlines()
    others = {answer.loss_law for answer in found.answers if answer.loss_law not in ("", answer.law)}
    lines += [f"* by the law of {name}; a line says nothing about losses" for name in sorted(others)] + [""]
    for answer in found.answers:
        if answer.teacher is not None:
            lines.append(f"{answer.law}: measured on {answer.measured}")
        if question.teachers and answer.ideal is not None:
            lines.append(f"{answer.law}: the best of all sizes would be {short(answer.ideal)}")
        if answer.alone is not None:
            lines.append(f"{answer.law}: the student without a teacher, from random weights: {answer.alone:.3f}")
        if answer.flat is not None:
            low, high = (short(end) for end in answer.flat)
            lines.append(f"{answer.law}: within {FLAT_NATS} nats of the lowest loss from {low} to {high}")
    if found.costs:
        priced = [answer for answer in found.answers if answer.losses]
        lines += ["", *_costs(found, priced)]
    lines += ["", *(f"warning: {warning}" for warning in found.warnings)] if found.warnings else []
    return "\n".join(lines)


def _answer(answer: Answer, per_token: bool) -> list[str]:
    cost = answer.cost
    if answer.teacher is None or cost is None:
        return [answer.law, "no answer", "-", "-", "-", "-", "-", "-"]
    flops = cost.flops_per_token if per_token or cost.flops is None else cost.flops
    loss = "-" if answer.loss is None else f"{answer.loss:.3f}{'' if answer.loss_law == answer.law else '*'}"
    return [
        answer.law, short(answer.teacher), _sizes_interval(answer.teacher_interval), f"{cost.ratio:.2f}", loss,
        _interval(answer.loss_interval, 3), f"{flops:.3g}", _pruning(cost.sparsity_percent, cost.width_percent),
    ]  # fmt: skip


def _costs(found: Recommendation, priced: list[Answer]) -> list[str]:
    flops = "FLOPs per token" if found.question.tokens is None else "FLOPs"
    headers = ["teacher", "T/S", flops, "pruning", *(f"loss: {one.law}" for one in priced)]
    rows = []
    for index, cost in enumerate(found.costs):
        number = cost.flops_per_token if cost.flops is None else cost.flops
        losses = [f"{one.losses[index]:.3f}" for one in priced]
        pruning = _pruning(cost.sparsity_percent, cost.width_percent)
        rows.append([short(cost.teacher), f"{cost.ratio:.2f}", f"{number:.3g}", pruning, *losses])
    return text_table(rows, headers).splitlines()


def _pruning(sparsity: float, width: int) -> str:
    return f"{sparsity:.0f} % ({width} % of widths)"
