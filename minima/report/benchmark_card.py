"""Benchmark scores on a model card: a table for people, and the `model-index` that the Hub reads. No torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from minima.report.cards import front_matter
from minima.report.tables import markdown_table

HEADING = "## Benchmark scores"
_SOURCE = "https://github.com/EleutherAI/lm-evaluation-harness"


@dataclass(frozen=True)
class BenchmarkScore:
    """One number of one task.

    Attributes:
        task: as the harness calls it.
        metric: likewise.
        value: as the harness gives it: a share where it is an accuracy.
        harness: its name and version.
        stderr: of the value; none where the harness gives none.
        shots: examples before the question.
        version: of the task.
        items: that were asked.
        limited: whether there are more of them.
        stand_in: whether they were made in place of the benchmark's own, which are not to be had.
    """

    task: str
    metric: str
    value: float
    harness: str
    stderr: float | None = None
    shots: str | None = None
    version: str | None = None
    items: int | None = None
    limited: bool = False
    stand_in: bool = False

    @property
    def mark(self) -> str:
        """What has to be said beside the task's name; empty for a whole score."""
        marks = ["stand-in items"] if self.stand_in else [f"{self.items} items"] if self.limited else []
        return f" ({', '.join(marks)})" if marks else ""


def with_benchmarks(card: str, name: str, scores: Sequence[BenchmarkScore]) -> str:
    """A card that tells these scores in place of any that it told before; all else stays as it is, edits included.

    A score on a part of its items, or on others in their place, is in the table, marked as such, and not in the
    `model-index`, where it would be taken for a whole one.

    Args:
        card: a model card with front matter that is a YAML mapping.
        name: of the model.
        scores: none leaves the card as it is.
    """
    if not scores:
        return card
    head, body = split(card)
    whole = [score for score in scores if not score.mark]
    head = {key: value for key, value in head.items() if key != "model-index"}
    if whole:
        head["model-index"] = [{"name": name, "results": [_result(score) for score in whole]}]
    body = re.sub(rf"^{re.escape(HEADING)}\n.*?(?=^## |\Z)", "", body, flags=re.DOTALL | re.MULTILINE)
    place = body.find("\n## Limits\n")
    place = len(body.rstrip()) if place < 0 else place + 1
    before, after = body[:place].rstrip(), body[place:].strip()
    return "\n\n".join(part for part in (front_matter(head), before.strip(), _section(scores), after) if part) + "\n"


def split(card: str) -> tuple[dict[str, Any], str]:
    """Front matter and text of a card.

    Raises:
        ValueError: the front matter is not a YAML mapping.
    """
    found = re.match(r"\s*---\r?\n(.*?)^---\s*$", card, flags=re.DOTALL | re.MULTILINE)
    if found is None:
        return {}, card
    try:
        head = yaml.safe_load(found[1]) or {}
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    if not isinstance(head, dict):
        raise ValueError(f"it is a {type(head).__name__}, not a list of keys")
    return head, card[found.end() :]


def _section(scores: Sequence[BenchmarkScore]) -> str:
    rows = [
        (
            score.task + score.mark,
            score.metric,
            score.shots,
            score.value,
            score.stderr,
            score.version,
        )
        for score in scores
    ]
    table = markdown_table(rows, ("task", "metric", "shots", "value", "standard error", "task version"))
    harness = ", ".join(dict.fromkeys(score.harness for score in scores))
    return f"{HEADING}\n\n{table}\n\nMeasured by {harness}; other harnesses give other numbers for the same model."


def _result(score: BenchmarkScore) -> dict[str, Any]:
    shots = "" if score.shots is None else f", {score.shots}-shot"
    version = "" if score.version is None else f", task version {score.version}"
    return {
        "task": {"type": "text-generation"},
        "dataset": {"name": score.task, "type": score.task},
        "metrics": [{"type": score.metric, "value": score.value, "name": f"{score.metric}{shots}{version}"}],
        "source": {"name": score.harness, "url": _SOURCE},
    }
