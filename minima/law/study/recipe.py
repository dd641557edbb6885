"""The settings of a study: which teachers, students, budgets, seeds and starts are compared. No torch."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, Field, PrivateAttr, ValidationError, model_validator

from minima.errors import MinimaError, RecipeError, ShapeError
from minima.models.shape import ModelShape
from minima.pruning.target import plan_target
from minima.recipe.base import Strict
from minima.recipe.loading import read_yaml
from minima.recipe.overrides import RecipeDumper, apply_override, nearest
from minima.recipe.problems import CELL_NAME, NAME, problem
from minima.recipe.pruning import PruneTarget

Initialisation = Literal["pruned_from_teacher", "pruned_from_fixed", "random", "direct"]
PRUNED = ("pruned_from_teacher", "pruned_from_fixed")
ENOUGH_TOKENS = 10  # per parameter of a student without embeddings: a smaller budget is warned about
_Name = Annotated[str, Field(pattern=CELL_NAME)]
_DO = "change the study's file; recipes/law-small.yaml is a small one that runs"


class Study(Strict):
    """A grid of teachers x students x token budgets x seeds x starts of the student.

    Attributes:
        name: the study's name; its folder is `runs/NAME` unless `output` says otherwise.
        output: the study's folder, relative to where the command runs.
        workers: number of processes that train in parallel on this machine, each of one rank; one per GPU, or one per
            core without a GPU, when not given.
        units_per_job: number of runs that one task of a Slurm array makes in one process.
        corpus: a build_data stage without its name and kind.
        shape: fields of `ModelShape` that all teachers and students share.
        teachers: by name, the fields in which their shapes differ; and `training`, keys in which a teacher's training
            differs.
        students: likewise.
        fixed_teacher: the teacher from which `pruned_from_fixed` cuts all students.
        tokens: training budgets of the students.
        seeds: each trains its own teachers and students; a seed sets the order of the text and random weights.
        initialisations: what a student starts from. `pruned_from_teacher`: cut from its own teacher, as in the paper.
            `pruned_from_fixed`: cut from `fixed_teacher`, whichever teacher teaches. `random`: random weights.
            `direct`: random weights and the text alone, without a teacher: the baseline to beat.
        teacher_training: keys of an adapt stage, including its length.
        student_training: keys of every student's training; the grid sets its length and seed.
        distillation: keys of a distil stage other than the training's: the loss's weights, temperature, divergence.
        pruning: keys of a prune stage: how importance is measured.
        evaluation: keys of an evaluate stage: how many held-out sequences.
    """

    name: str = Field(pattern=NAME)
    output: str | None = None
    workers: int | None = Field(default=None, gt=0)
    units_per_job: int = Field(default=4, gt=0)
    corpus: dict[str, Any]
    shape: dict[str, Any] = {}
    teachers: dict[_Name, dict[str, Any]] = Field(min_length=1)
    students: dict[_Name, dict[str, Any]] = Field(min_length=1)
    fixed_teacher: str | None = None
    tokens: list[Annotated[int, Field(gt=0)]] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)
    initialisations: list[Initialisation] = Field(min_length=1)
    teacher_training: dict[str, Any]
    student_training: dict[str, Any]
    distillation: dict[str, Any] = {}
    pruning: dict[str, Any] = {}
    evaluation: dict[str, Any] = {}
    _shapes: dict[str, ModelShape] = PrivateAttr(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The study's folder."""
        return Path(self.output or f"runs/{self.name}").expanduser()

    def shape_of(self, name: str) -> ModelShape:
        """The shape of a teacher or a student."""
        return self._shapes[name]

    def teacher_tokens(self) -> list[int]:
        """Tokens that a teacher is trained on; empty if they depend on the data, because epochs are given."""
        training, length = self.teacher_training, int(self.corpus.get("sequence_length", 1))
        if "tokens" in training:
            return [int(training["tokens"])]
        if "steps" in training and "batch_sequences" in training:
            return [int(training["steps"]) * int(training["batch_sequences"]) * length]
        return []

    def smaller(self, student: str, teacher: str) -> bool:
        """Whether a student is smaller than a teacher, without embeddings; other pairs are not in the grid."""
        return self.shape_of(student).non_embedding_parameters < self.shape_of(teacher).non_embedding_parameters

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key in ("tokens", "seeds", "initialisations"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise RecipeError(f"{key} {values} has a duplicate", "a cell of the grid would be run twice", _DO)
        if both := sorted(set(self.teachers) & set(self.students)):
            raise RecipeError(f"{both[0]!r} is a teacher and a student", "cells are named after both of them", _DO)
        for kind, members in (("teachers", self.teachers), ("students", self.students)):
            for name, own in members.items():
                self._shapes[name] = self._shape(f"{kind}.{name}", own)
        self._check_vocabularies()
        self._check_settings()
        self._check_budgets()
        self._check_pairs()
        return self

    def _shape(self, place: str, own: dict[str, Any]) -> ModelShape:
        try:
            return ModelShape(**(self.shape | {key: value for key, value in own.items() if key != "training"}))
        except ValidationError as error:
            raise RecipeError(f"{place}: {_problems(error, ModelShape)}", "no such model can be built", _DO) from None

    def _check_vocabularies(self) -> None:
        tokenizer = self.corpus.get("tokenizer")
        size = tokenizer.get("vocabulary_size") if isinstance(tokenizer, dict) else None
        for name, shape in self._shapes.items():
            size = size or shape.vocabulary_size
            if shape.vocabulary_size != size:
                raise RecipeError(
                    f"{name} has a vocabulary of {shape.vocabulary_size}, but the study's is {size}",
                    "losses and divergences are compared token by token, so all must be over the same tokens",
                    "give one vocabulary_size under `shape`, that of the corpus's tokenizer",
                )

    def _check_settings(self) -> None:
        owned = {
            "corpus": ("name", "kind"),
            "teacher_training": ("name", "kind", "model", "data", "seed"),
            "student_training": ("name", "kind", "model", "data", "seed", "teacher", "steps", "tokens", "epochs"),
            "distillation": ("name", "kind", "model", "data", "seed", "teacher", "steps", "tokens", "epochs"),
            "pruning": ("name", "kind", "model", "data", "seed", "target", "scores", "score"),
            "evaluation": ("name", "kind", "models", "data", "teacher"),
        }
        blocks = [(block, getattr(self, block), block) for block in owned]
        for kind, members in (("teacher", self.teachers), ("student", self.students)):
            blocks += [
                (f"{kind}s.{name}.training", own.get("training", {}), f"{kind}_training")
                for name, own in members.items()
            ]
        for place, settings, kind in blocks:
            for key in settings:
                if key in owned[kind]:
                    raise RecipeError(
                        f"{place}.{key} is given", "the study's grid sets it for each of its runs", f"remove {key}"
                    )

    def _check_budgets(self) -> None:
        """Refuse budgets of less than one block, and two of the same number of blocks: only whole blocks count."""
        length = self.corpus.get("sequence_length")
        if not isinstance(length, int) or length < 1:
            return  # refused with the corpus
        same: dict[int, int] = {}
        for tokens in self.tokens:
            blocks = tokens // length
            if not blocks:
                raise RecipeError(
                    f"tokens {tokens:,} are less than one block of {length:,}",
                    "a student is trained on whole blocks, so this one would not be trained at all",
                    f"give at least {length:,} tokens, and enough for a student to learn from",
                )
            if blocks in same:
                raise RecipeError(
                    f"tokens {same[blocks]:,} and {tokens:,} are the same {blocks:,} blocks of {length:,}",
                    "a student is trained on whole blocks, so a cell of the grid would be run twice",
                    f"leave one of them out, or let them differ by at least {length:,}",
                )
            same[blocks] = tokens

    def _check_pairs(self) -> None:
        for student in self.students:
            if not any(self.smaller(student, teacher) for teacher in self.teachers):
                size = self.shape_of(student).non_embedding_parameters
                raise RecipeError(
                    f"the student {student} ({size:,} parameters without embeddings) is not smaller than any teacher",
                    "a student must be smaller than its teacher to be in the grid, so it would have no cell",
                    "make it smaller, add a larger teacher, or leave it out",
                )
        fixed = "pruned_from_fixed" in self.initialisations
        if fixed and self.fixed_teacher not in self.teachers:
            raise RecipeError(
                f"pruned_from_fixed with fixed_teacher {self.fixed_teacher!r}"
                f"{nearest(str(self.fixed_teacher), list(self.teachers))}",
                "all students are cut from that one teacher",
                f"set fixed_teacher to one of {', '.join(self.teachers)}",
            )
        for teacher in self.teachers:
            own = "pruned_from_teacher" in self.initialisations
            for student in self.students:
                if self.smaller(student, teacher) and (own or (fixed and teacher == self.fixed_teacher)):
                    self._check_cut(student, teacher)

    def _check_cut(self, student: str, teacher: str) -> None:
        wanted = self.shape_of(student)
        try:
            found = plan_target(self.shape_of(teacher), prune_target(wanted)).student
        except ShapeError as error:
            raise RecipeError(
                f"the student {student} cannot be cut from the teacher {teacher}: {error.what}", error.why, error.do
            ) from None
        wrong = [key for key, value in found.model_dump().items() if value != getattr(wanted, key)]
        if wrong:
            shown = ", ".join(f"{key} {getattr(found, key)} and not {getattr(wanted, key)}" for key in wrong)
            raise RecipeError(
                f"the student {student} cannot be cut from the teacher {teacher}: it would have {shown}",
                "pruning keeps these, so the cell's student would be another model",
                "give teacher and student the same values, or leave the pruned initialisations out",
            )


def load_study(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> Study:
    """Load the study in a YAML file, changed by `key.path=value`.

    Raises:
        RecipeError: it cannot be read, or asks for something that does not exist or is impossible.
    """
    raw = read_yaml(path)
    for override in overrides:
        apply_override(raw, override)
    if "stages" in raw and not raw.keys() & {"teachers", "students"}:
        raise RecipeError(
            f"{path.name} is the recipe of a run, not a study of teachers and students",
            "a study is a grid of runs, and names the models that they compare",
            f"minima run {path}",
        )
    try:
        return Study.model_validate(raw)
    except ValidationError as error:
        causes = [detail.get("ctx", {}).get("error") for detail in error.errors()]
        for cause in causes:
            if isinstance(cause, MinimaError):
                raise type(cause)(f"{path.name}: {cause.what}", cause.why, cause.do) from None
        raise RecipeError(
            f"{path.name}: {_problems(error, Study)}", "the study would not be what was meant", _DO
        ) from None


def warnings(study: Study) -> list[str]:
    """Warnings about what makes a study weaker than it looks, one line each."""
    found = []
    for student in study.students:
        size = study.shape_of(student).non_embedding_parameters
        few = [tokens for tokens in study.tokens if tokens < ENOUGH_TOKENS * size]
        if few:
            found.append(
                f"{student} is trained on {few[0]:,} tokens, {few[0] / size:.1f} for each of its {size:,} parameters "
                f"without embeddings; below {ENOUGH_TOKENS} its loss says more about the budget than about the teacher"
            )
    if len(study.seeds) == 1:
        found.append("one seed: no difference between two cells can be distinguished from chance")
    if len(study.teachers) < 3:
        found.append(f"{len(study.teachers)} teachers: a minimum between two others needs at least 3")
    return found


def prune_target(shape: ModelShape) -> PruneTarget:
    """The target of a prune stage that cuts a model to this shape."""
    return PruneTarget(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_heads=shape.num_heads,
        intermediate_size=shape.intermediate_size,
    )


def resolved_yaml(study: Study) -> str:
    """The study with its defaults written out; loads again to an equal one."""
    return yaml.dump(study.model_dump(mode="json"), Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=120)


def _problems(error: ValidationError, root: type[BaseModel]) -> str:
    found = []
    for detail in error.errors():
        if isinstance(cause := detail.get("ctx", {}).get("error"), MinimaError):
            found.append(cause.what)
        else:
            place = ".".join(str(part) for part in detail["loc"] if part != "[key]")
            found.append(f"{place}: {problem(detail, root)}")
    return "; ".join(found)
