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
    """One score on one task."""

    task: str  # the harness's name for the task
    metric: str  # the harness's name for the metric
    value: float  # as reported by the harness; accuracies are fractions
    harness: str  # its name and version
    stderr: float | None = None  # standard error of the value; None if the harness gives none
    shots: str | None = None  # number of examples before the question
    version: str | None = None  # of the task
    items: int | None = None  # number of items evaluated
    limited: bool = False  # whether the task has more items than that
    stand_in: bool = False  # whether the items were made as substitutes, because the benchmark's own are not available

    @property
    def mark(self) -> str:
        """A caveat to show beside the task's name; empty for a complete score."""
        marks = ["stand-in items"] if self.stand_in else [f"{self.items} items"] if self.limited else []
        return f" ({', '.join(marks)})" if marks else ""


def with_benchmarks(card: str, name: str, scores: Sequence[BenchmarkScore]) -> str:
    """Replace the benchmark scores of a card; everything else, including edits by hand, is left unchanged.

    A score on only some of the items, or on stand-in items, is marked in the table and left out of the `model-index`,
    where it would be mistaken for a complete one.

    Args:
        card: a model card with front matter that is a YAML mapping.
        scores: if empty, the card is returned unchanged.
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
    """Split a card into its front matter and text.

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
        raise ValueError(f"it is a {type(head).__name__}, not keys with values")
    return head, card[found.end() :]


def _section(scores: Sequence[BenchmarkScore]) -> str:
    rows = [
        (score.task + score.mark, score.metric, score.shots, score.value, score.stderr, score.version)
        for score in scores
    ]
    table = markdown_table(rows, ("task", "metric", "shots", "value", "standard error", "task version"))
    harness = ", ".join(dict.fromkeys(score.harness for score in scores))
    return f"{HEADING}\n\n{table}\n\nMeasured with {harness}; other harnesses give other numbers for the same model."


def _result(score: BenchmarkScore) -> dict[str, Any]:
    shots = "" if score.shots is None else f", {score.shots}-shot"
    version = "" if score.version is None else f", task version {score.version}"
    return {
        "task": {"type": "text-generation"},
        "dataset": {"name": score.task, "type": score.task},
        "metrics": [{"type": score.metric, "value": score.value, "name": f"{score.metric}{shots}{version}"}],
        "source": {"name": score.harness, "url": _SOURCE},
    }
