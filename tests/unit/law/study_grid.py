"""A small study for tests, and what finishes its runs without training anything."""

import copy
import json
from pathlib import Path
from typing import Any

import yaml

from minima.law.study.grid import CORPUS, QUALITY, STUDENT, TEACHER, Unit, expand
from minima.law.study.recipe import Study, load_study

TRAINING = {"batch_sequences": 8, "micro_batch_sequences": 8, "learning_rate": 1e-2, "precision": "float32"}
GRID: dict[str, Any] = {
    "name": "tiny",
    "corpus": {
        "sources": [{"embedded": "sotu", "max_documents": 4}],
        "tokenizer": {"vocabulary_size": 512},
        "sequence_length": 32,
    },
    "shape": {"vocabulary_size": 512, "num_layers": 2, "max_positions": 32, "tied": True},
    "teachers": {
        "small": {"hidden_size": 24, "num_heads": 3, "intermediate_size": 32},
        "large": {"hidden_size": 48, "num_heads": 6, "intermediate_size": 80, "training": {"learning_rate": 5e-3}},
    },
    "students": {
        "a": {"hidden_size": 16, "num_heads": 2, "intermediate_size": 16},
        "b": {"hidden_size": 32, "num_heads": 4, "intermediate_size": 40},
    },
    "fixed_teacher": "large",
    "tokens": [163_840],
    "seeds": [1, 2],
    "initialisations": ["pruned_from_teacher", "pruned_from_fixed", "random", "direct"],
    "teacher_training": TRAINING | {"steps": 20},
    "student_training": dict(TRAINING),
    "distillation": {"hard_weight": 0.3, "soft_weight": 0.7},
    "pruning": {"sequences": 16, "precision": "float32"},
    "evaluation": {"sequences": 8},
}


def study_file(folder: Path, **changes: Any) -> Path:
    """A study's YAML; `None` takes a key away."""
    raw = {key: value for key, value in (copy.deepcopy(GRID) | changes).items() if value is not None}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def study_of(folder: Path, **changes: Any) -> tuple[Study, list[Unit]]:
    """The study, and its runs, under `folder`."""
    path = study_file(folder, output=str(folder / "runs"), **changes)
    study = load_study(path)
    return study, expand(study, path)


def finish(unit: Unit, loss: float = 3.0) -> None:
    """Manifests as a run leaves them."""
    for stage in unit.recipe.stages:
        metrics: dict[str, Any] = {"tokens": 81_920}
        if stage.name == CORPUS:
            metrics = {"tokens": 100_000}
        elif stage.name == QUALITY:
            scores = {"loss": loss, "bits_per_byte": loss / 2, "kl": 0.25}
            metrics = {TEACHER if unit.teacher else STUDENT: scores}
        folder = unit.folder / stage.name
        folder.mkdir(parents=True, exist_ok=True)
        content = {"identity": f"identity-of-{stage.name}", "metrics": metrics, "seconds": 7.5}
        (folder / "manifest.json").write_text(json.dumps(content))
