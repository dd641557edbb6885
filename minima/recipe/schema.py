"""The typed recipe: one file holds a whole run as a list of stages. No torch: it parses on a login node."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from minima.errors import RecipeError
from minima.recipe.base import ModelInput, Stage, Strict, as_model
from minima.recipe.data import Source, TokenizerTraining
from minima.recipe.pruning import Prune
from minima.recipe.training import Training


class BuildData(Stage):
    """Text in, token blocks out.

    Attributes:
        sources: where documents come from, each with its weight in the mixture.
        tokenizer: one to train on the sources, or the name of an earlier stage, a folder, or a Hub id.
        sequence_length: tokens of one block. Blocks are cut from the stream of documents, each closed by the end
            token; what is left at the end and is less than a block is counted and dropped.
        tokens: how many training tokens to write, over all sources; every token once when not given.
        held_out_fraction: share of documents that are set aside, chosen by a hash of their text.
        held_out_tokens: at most this many held-out tokens are kept, in whole blocks.
        processes: worker processes; the machine's cores when not given.
        shard_tokens: tokens of one shard file, rounded down to whole blocks.
        seed: orders documents and chooses held-out ones.
    """

    kind: Literal["build_data"]
    sources: list[Source] = Field(min_length=1)
    tokenizer: str | TokenizerTraining
    sequence_length: int = Field(gt=1)
    tokens: int | None = Field(default=None, gt=0)
    held_out_fraction: float = Field(default=0.005, ge=0, lt=1)
    held_out_tokens: int | None = Field(default=None, gt=0)
    processes: int | None = Field(default=None, gt=0)
    shard_tokens: int = Field(default=2**28, gt=0)
    seed: int = 776


class Adapt(Training, Stage):
    """Causal language modelling from a checkpoint or from random weights.

    Attributes:
        model: the weights to start from.
        data: a build_data stage, or the path of its folder.
    """

    kind: Literal["adapt"]
    model: ModelInput
    data: str

    _coerce_model = field_validator("model", mode="before")(as_model)


class Distil(Training, Stage):
    """Train a student on text and on a frozen teacher's predictions for it.

    Attributes:
        model: the student's starting weights.
        teacher: the frozen model.
        data: a build_data stage, or the path of its folder.
        hard_weight: weight of the cross-entropy with the text. 0.5 as published.
        soft_weight: weight of the cross-entropy with the teacher. 0.5 as published.
        temperature: divides both models' logits in the soft part, which is scaled by its square.
        chunk_tokens: tokens whose logits exist at one time.
        teacher_precision: dtype of the teacher's weights; the student's when not given.
        teacher_deepspeed: DeepSpeed JSON for the frozen teacher.
    """

    kind: Literal["distil"]
    model: ModelInput
    teacher: ModelInput
    data: str
    hard_weight: float = Field(default=0.5, ge=0)
    soft_weight: float = Field(default=0.5, ge=0)
    temperature: float = Field(default=1.0, gt=0)
    chunk_tokens: int = Field(default=1024, gt=0)
    teacher_precision: Literal["float32", "bfloat16"] | None = None
    teacher_deepspeed: str = "teacher_zero3.json"

    _coerce_model = field_validator("model", "teacher", mode="before")(as_model)

    @model_validator(mode="after")
    def _some_weight(self) -> Self:
        if self.hard_weight + self.soft_weight == 0:
            raise RecipeError(
                f"distil stage {self.name!r} has hard_weight 0 and soft_weight 0",
                "nothing would be learnt",
                "give at least one of them a weight above 0",
            )
        return self


class Evaluate(Stage):
    """Held-out loss, perplexity and bits per byte of models, and their agreement with a teacher.

    Attributes:
        models: earlier stages (`student@12000` for one checkpoint), folders or Hub ids.
        teacher: the model that the others are compared with (KL and top-1 agreement); none when not given.
        data: a build_data stage whose held-out blocks are read.
        sequences: at most this many held-out blocks; all when not given.
        micro_batch_sequences: blocks of one forward pass on one rank.
        precision: dtype of weights and activations; float32 shows small differences.
        deepspeed: DeepSpeed JSON for the frozen models.
    """

    kind: Literal["evaluate"]
    models: list[str] = Field(min_length=1)
    teacher: str | None = None
    data: str
    sequences: int | None = Field(default=None, gt=0)
    micro_batch_sequences: int = Field(default=4, gt=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    deepspeed: str = "teacher_zero3.json"


class Export(Stage):
    """A folder that plain transformers loads.

    Attributes:
        model: the trained stage (`student@12000` for one checkpoint).
        dtype: of the written weights; the dtype that the stage trained in when not given.
        shard_bytes: a new file is begun when one would grow past this many bytes.
        licence: licence identifier for the model card.
        deepspeed: DeepSpeed JSON for the hosts that compare logits.
    """

    kind: Literal["export"]
    model: str
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    shard_bytes: int = Field(default=4_000_000_000, gt=0)
    licence: str | None = None
    deepspeed: str = "teacher_zero3.json"


AnyStage = Annotated[
    BuildData | Adapt | Prune | Distil | Evaluate | Export,
    Field(discriminator="kind"),
]


RESERVED_NAMES = frozenset({"lock", "logs", "recipe.yaml", "summary.json", "hub.json"})  # beside the stages' folders


class Recipe(Strict):
    """A whole run.

    Attributes:
        name: of the run; its folder is `runs/NAME` unless `output` says otherwise.
        output: the run's folder; relative to where the command runs.
        launcher: which `launch/X.sh` starts the stages: one beside the recipe, or one that minima ships.
        ranks: processes that `minima run` starts on this machine (a launcher by hand takes MINIMA_RANKS); one for each
            GPU, or 2 without a GPU, when not given.
        max_ranks: no more than this many where `ranks` is not given; for runs too small to be shared by all GPUs.
        stages: in the order in which they run; each reads earlier ones by name.
        summary: what `summary.json` holds: nested names, each a `STAGE.metric.path`, or a list of them to average.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    output: str | None = None
    launcher: str = Field(default="deepspeed", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    ranks: int | None = Field(default=None, gt=0)
    max_ranks: int | None = Field(default=None, gt=0)
    stages: list[AnyStage] = Field(min_length=1)
    summary: dict[str, Any] = {}

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        seen: set[str] = set()
        for stage in self.stages:
            if stage.name in seen:
                raise RecipeError(
                    f"two stages are called {stage.name!r}",
                    "a stage's name is its folder, so the second would overwrite the first",
                    "rename one of them",
                )
            seen.add(stage.name)
        for name in sorted(seen & RESERVED_NAMES):
            raise RecipeError(
                f"a stage is called {name!r}",
                "the run's folder keeps a file or folder of its own under that name",
                "rename the stage",
            )
        return self

    def stage(self, name: str) -> AnyStage:
        """The stage of that name.

        Raises:
            RecipeError: there is none.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        names = ", ".join(stage.name for stage in self.stages)
        raise RecipeError(f"no stage is called {name!r}", "only stages of the recipe can run", f"choose among {names}")
