"""A recommendation as text."""

from minima.law.answers import Answer, Recommendation
from minima.law.interpolate import Interval
from minima.law.recommend import FLAT_NATS
from minima.law.report import sizes_interval
from minima.law.sizes_text import short
from minima.report.tables import text_table


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
        answer.law, short(answer.teacher), sizes_interval(answer.teacher_interval), f"{cost.ratio:.2f}", loss,
        _loss_interval(answer.loss_interval), f"{flops:.3g}", _pruning(cost.sparsity_percent, cost.width_percent),
    ]  # fmt: skip


def _costs(found: Recommendation, priced: list[Answer]) -> list[str]:
    per_token = found.question.tokens is None
    headers = [
        "teacher",
        "T/S",
        "FLOPs per token" if per_token else "FLOPs",
        "pruning",
        *(f"loss: {one.law}" for one in priced),
    ]
    rows = []
    for index, cost in enumerate(found.costs):
        flops = cost.flops_per_token if cost.flops is None else cost.flops
        losses = [f"{one.losses[index]:.3f}" for one in priced]
        pruning = _pruning(cost.sparsity_percent, cost.width_percent)
        rows.append([short(cost.teacher), f"{cost.ratio:.2f}", f"{flops:.3g}", pruning, *losses])
    return text_table(rows, headers).splitlines()


def _pruning(sparsity: float, width: int) -> str:
    return f"{sparsity:.0f} % ({width} % of widths)"


def _loss_interval(ends: Interval | None) -> str:
    return "-" if ends is None else " to ".join("open" if end is None else f"{end:.3f}" for end in ends)
