"""Adds benchmark scores that were measured after an export to its model card. No torch."""

import json
import logging
from pathlib import Path
from typing import Any

from minima.errors import StageError
from minima.report.benchmark_card import BenchmarkScore, with_benchmarks
from minima.stages.manifest import is_finished, read_manifest

logger = logging.getLogger(__name__)


def updated_card(export: Path, card: str) -> str:
    """An export's card with the scores from the finished benchmark stages of its run.

    Args:
        export: the export stage's folder; the benchmark stages' folders are beside it.
        card: the card's text; may have been edited by hand.

    Raises:
        ValueError: its front matter is not valid YAML.
        StageError: the results of one of those stages cannot be read; names the file.
    """
    scores: list[BenchmarkScore] = []
    for folder in sorted(path for path in export.resolve().parent.iterdir() if is_finished(path)):
        stage = read_manifest(folder).get("stage", {})
        if stage.get("kind") == "benchmark" and _is_of(stage, export):
            scores += benchmark_scores(folder)
    if scores:
        logger.info("the card of %s shows %d benchmark scores", export.name, len(scores))
    return with_benchmarks(card, export.name, scores)


def _is_of(stage: dict[str, Any], export: Path) -> bool:
    name = stage.get("model", "")
    folders = (export.resolve(), export.resolve() / "model")
    return name == export.resolve().name or ("/" in name and Path(name).expanduser().resolve() in folders)


def benchmark_scores(folder: Path) -> list[BenchmarkScore]:
    """The scores that a benchmark stage stored; empty if it only wrote answers.

    Raises:
        StageError: they cannot be read.
    """
    path = folder / "benchmark.json"
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        harness = " ".join(str(part) for part in found["harness"].values() if part is not None)
        return [_score(name, task, harness) for name, task in found["tasks"].items()]
    except PermissionError:  # the file is not damaged, so the advice below would be wrong
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StageError(
            f"{path} cannot be read: {type(error).__name__}: {error}",
            "the model card shows the scores of all finished benchmark stages",
            f"remove {folder} and run the stage again, or restore the file",
        ) from error


def _score(name: str, task: dict[str, Any], harness: str) -> BenchmarkScore:
    return BenchmarkScore(
        task=name,
        metric=task["metric"],
        value=task["score"],
        harness=harness,
        stderr=task["stderr"] if isinstance(task["stderr"], int | float) else None,
        shots=None if task["shots"] is None else str(task["shots"]),
        version=None if task["version"] is None else str(task["version"]),
        items=task["items"],
        limited=task.get("limited", False),
        stand_in=task.get("stand_in", False),
    )
