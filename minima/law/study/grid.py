"""Expand a study into ordinary runs: one for the data, one per teacher and seed, one per cell. No torch.

Each run has its own recipe and folder, and reads the others by their paths. So teachers, data and scores are made once,
`minima run FOLDER/recipe.yaml` repeats any of them, and their state is that of ordinary runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minima.errors import RecipeError
from minima.law.study.recipe import PRUNED, Initialisation, Study, prune_target
from minima.models.shape import ModelShape
from minima.planning.arithmetic import plan_training, training_flops
from minima.recipe.distillation import Distil
from minima.recipe.loading import make_recipe
from minima.recipe.schema import Adapt, BuildData, Recipe
from minima.stages.manifest import is_finished

DATA, TEACHERS, CELLS = "data", "teachers", "cells"  # folders of a study, and levels: each reads the one before it
CORPUS, TEACHER, SCORES, PRUNED_STUDENT, STUDENT, QUALITY = (
    "corpus", "teacher", "scores", "pruned", "student", "quality",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One student run of the grid."""

    student: str  # name of its shape
    teacher: str | None  # name of its teacher's shape; None for `direct`
    initialisation: Initialisation  # what it starts from
    tokens: int  # tokens that it is trained on
    seed: int  # seed of its run and of its teacher's training


@dataclass(frozen=True)
class Unit:
    """One ordinary run of a study."""

    name: str  # `data/corpus`, `teachers/NAME-seedN` or `cells/...`: its folder inside the study's
    recipe: Recipe  # its stages
    needs: tuple[str, ...] = ()  # names of the units that it reads
    flops: float = 0.0  # FLOPs of its training; 0 for the data. Cheap runs come first
    cell: Cell | None = None  # the cell, if it is one
    teacher: tuple[str, int] | None = None  # name and seed, if it is a teacher

    @property
    def level(self) -> str:
        """`data`, `teachers` or `cells`."""
        return self.name.split("/")[0]

    @property
    def folder(self) -> Path:
        """The run's folder."""
        assert self.recipe.output is not None
        return Path(self.recipe.output)

    def is_done(self) -> bool:
        """Whether all its stages are finished."""
        return all(is_finished(self.folder / stage.name) for stage in self.recipe.stages)


def cells(study: Study) -> list[Cell]:
    """The cells of the grid: only those whose student is smaller than its teacher."""
    found = []
    for seed in study.seeds:
        for tokens in study.tokens:
            for student in study.students:
                for start in study.initialisations:
                    if start == "direct":
                        found.append(Cell(student, None, start, tokens, seed))
                        continue
                    if start == "pruned_from_fixed" and not study.smaller(student, str(study.fixed_teacher)):
                        continue
                    for teacher in study.teachers:
                        if study.smaller(student, teacher):
                            found.append(Cell(student, teacher, start, tokens, seed))
    if not found:
        raise RecipeError("the grid is empty", "nothing would run", "add an initialisation, or a larger teacher")
    return found


def expand(study: Study, path: Path) -> list[Unit]:
    """All runs of a study, in the order in which a single process would make them.

    Args:
        path: its file, which errors name.

    Raises:
        RecipeError: a stage's settings are refused, or the grid is empty.
    """
    grid = cells(study)
    corpus = _recipe(study, f"{DATA}/{CORPUS}", [{**study.corpus, "name": CORPUS, "kind": "build_data"}], path)
    units = [Unit(f"{DATA}/{CORPUS}", corpus)]
    for name, seed in _teachers(study, grid):
        units.append(_teacher(study, name, seed, path))
    units += [_cell(study, cell, path) for cell in grid]
    return units


def sequence_length(units: Sequence[Unit]) -> int:
    """Tokens per block of the study's data."""
    stage = units[0].recipe.stages[0]
    assert isinstance(stage, BuildData)
    return stage.sequence_length


def name_of(cell: Cell) -> str:
    """The name of a cell's unit."""
    teacher = [] if cell.teacher is None else [cell.teacher]
    return f"{CELLS}/{'-'.join([cell.student, *teacher, cell.initialisation, str(cell.tokens), f'seed{cell.seed}'])}"


def teacher_name(teacher: str, seed: int) -> str:
    """The name of a teacher's unit."""
    return f"{TEACHERS}/{teacher}-seed{seed}"


def _teachers(study: Study, grid: Sequence[Cell]) -> list[tuple[str, int]]:
    """Teachers that some cell reads, with their seeds."""
    read = {(cell.teacher, cell.seed) for cell in grid}
    read |= {(study.fixed_teacher, cell.seed) for cell in grid if cell.initialisation == "pruned_from_fixed"}
    return [(name, seed) for seed in study.seeds for name in study.teachers if (name, seed) in read]


def _teacher(study: Study, name: str, seed: int, path: Path) -> Unit:
    shape, data = study.shape_of(name), str(study.folder / DATA / CORPUS / CORPUS)
    training = {**study.teacher_training, **study.teachers[name].get("training", {})}
    start = {"random": shape.model_dump()}
    stages: list[dict[str, Any]] = [
        {**training, "name": TEACHER, "kind": "adapt", "model": start, "data": data, "seed": seed}
    ]
    cut = [student for student in study.students if _cuts(study, student, name)]
    if cut:  # every student that is cut from this teacher reads these scores
        target = prune_target(study.shape_of(cut[0])).model_dump(exclude_none=True)
        scoring = {"name": SCORES, "kind": "prune", "model": TEACHER, "data": data, "seed": seed, "target": target}
        stages.append({**study.pruning, **scoring})
    stages.append({**study.evaluation, "name": QUALITY, "kind": "evaluate", "models": [TEACHER], "data": data})
    unit = teacher_name(name, seed)
    recipe = _recipe(study, unit, stages, path)
    flops = _flops(study, recipe.stages[0], shape, None)
    return Unit(unit, recipe, (f"{DATA}/{CORPUS}",), flops, teacher=(name, seed))


def _cuts(study: Study, student: str, teacher: str) -> bool:
    fixed = "pruned_from_fixed" in study.initialisations and teacher == study.fixed_teacher
    return (fixed or "pruned_from_teacher" in study.initialisations) and study.smaller(student, teacher)


def _cell(study: Study, cell: Cell, path: Path) -> Unit:
    shape, data = study.shape_of(cell.student), str(study.folder / DATA / CORPUS / CORPUS)
    needs, stages = [f"{DATA}/{CORPUS}"], []
    start: dict[str, Any] | str = {"random": shape.model_dump()}
    if cell.initialisation in PRUNED:
        origin = cell.teacher if cell.initialisation == "pruned_from_teacher" else study.fixed_teacher
        unit = teacher_name(str(origin), cell.seed)
        needs.append(unit)
        stages.append(_prune_stage(study, shape, study.folder / unit))
        start = PRUNED_STUDENT
    training: dict[str, Any] = {**study.student_training, **study.students[cell.student].get("training", {})}
    training |= {"name": STUDENT, "model": start, "data": data, "seed": cell.seed, "tokens": cell.tokens}
    quality: dict[str, Any] = {**study.evaluation, "name": QUALITY, "kind": "evaluate", "models": [STUDENT]}
    quality["data"] = data
    if cell.teacher is None:
        stages.append({**training, "kind": "adapt"})
    else:
        unit = teacher_name(cell.teacher, cell.seed)
        needs.append(unit)
        source = str(study.folder / unit / TEACHER)
        teacher = {"source": source, "placement": "replica"}  # with one rank, its copy is the only one
        stages.append({**training, **study.distillation, "kind": "distil", "teacher": teacher})
        quality["teacher"] = source
    stages.append(quality)
    recipe = _recipe(study, name_of(cell), stages, path)
    trained = recipe.stage(STUDENT)
    flops = _flops(study, trained, shape, None if cell.teacher is None else study.shape_of(cell.teacher))
    return Unit(name_of(cell), recipe, tuple(dict.fromkeys(needs)), flops, cell)


def _prune_stage(study: Study, shape: ModelShape, folder: Path) -> dict[str, Any]:
    measured = ("sequences", "micro_batch_sequences", "sequence_length")  # settings of the scores, which exist already
    settings = {key: value for key, value in study.pruning.items() if key not in measured}
    return {
        **settings,
        "name": PRUNED_STUDENT,
        "kind": "prune",
        "model": str(folder / TEACHER),
        "scores": str(folder / SCORES),
        "target": prune_target(shape).model_dump(exclude_none=True),
    }


def _recipe(study: Study, unit: str, stages: list[dict[str, Any]], path: Path) -> Recipe:
    raw = {"name": f"{study.name}.{unit.split('/')[1]}", "output": str(study.folder / unit), "stages": stages}
    return make_recipe(raw | {"launcher": "local", "ranks": 1}, path)


def _flops(study: Study, stage: Any, shape: ModelShape, teacher: ModelShape | None) -> float:
    """FLOPs of a unit's training; of one step, if its length is given in epochs."""
    assert isinstance(stage, Adapt | Distil)
    length = int(study.corpus.get("sequence_length", 1))
    plan = plan_training(stage, length, None)
    if plan is None:
        plan = plan_training(stage.model_copy(update={"epochs": None, "steps": 1}), length, None)
    assert plan is not None
    return training_flops(plan, shape, teacher if getattr(stage, "soft_weight", 0) else None)
