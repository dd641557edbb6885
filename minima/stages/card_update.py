"""Benchmark scores that came after an export, for its model card. No torch."""

import logging
from pathlib import Path
from typing import Any

from minima.report.benchmark_card import BenchmarkScore, with_benchmarks
from minima.stages.manifest import is_finished, read_manifest

logger = logging.getLogger(__name__)


def updated_card(export: Path, card: str) -> str:
    """An export's card with what the finished benchmark stages of its run measured of it.

    Args:
        export: the export stage's folder; the benchmark stages lie beside it.
        card: its text; may have been edited.

    Raises:
        ValueError: its front matter is not YAML.
    """
    scores: list[BenchmarkScore] = []
    for folder in sorted(path for path in export.resolve().parent.iterdir() if is_finished(path)):
        manifest = read_manifest(folder)
        stage = manifest.get("stage", {})
        if stage.get("kind") == "benchmark" and _is_of(stage, export):
            scores += benchmark_scores(manifest.get("metrics") or {})
    if scores:
        logger.info("the card of %s tells %d benchmark scores", export.name, len(scores))
    return with_benchmarks(card, export.name, scores)


def _is_of(stage: dict[str, Any], export: Path) -> bool:
    name = stage.get("model", "")
    folders = (export.resolve(), export.resolve() / "model")
    return name == export.resolve().name or ("/" in name and Path(name).expanduser().resolve() in folders)


def benchmark_scores(metrics: dict[str, Any]) -> list[BenchmarkScore]:
    """The scores in a benchmark stage's metrics; one that was not measured is left out."""
    found = []
    for task, score in (metrics.get("scores") or {}).items():
        if not isinstance(score, dict) or not isinstance(score.get("value"), int | float):
            continue
        found.append(
            BenchmarkScore(
                task=task,
                metric=str(score.get("metric", "score")),
                value=float(score["value"]),
                harness=f"lm-eval {metrics.get('lm_eval_version', '')}".strip(),
                stderr=score.get("stderr"),
                shots=score.get("shots"),
                version=None if score.get("version") is None else str(score["version"]),
                limit=score.get("limit"),
            )
        )
    return found
