"""The typed recipe: one file holds a whole run as a list of stages. No torch: it parses on a login node."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from minima.errors import RecipeError
from minima.models.shape import ModelShape
from minima.recipe.data import Source, TokenizerTraining
from minima.recipe.training import Training


class Strict(BaseModel):
    """A block whose unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelInput(Strict):
    """Where a model's weights come from. A plain string in a recipe is a `source`.

    Attributes:
        source: the name of an earlier stage (`student`, or `student@12000` for the checkpoint after that step), a
            folder in Hugging Face's layout, or a Hub id.
        revision: branch, tag or commit on the Hub; its default branch when not given.
        random: start from random weights of this shape instead. Every tensor's values follow from the run's seed
            and the tensor's name alone, so they are the same on any number of ranks.
        shape: what the source's shape is expected to be. Lets `--dry-run` count a model that is not on this machine;
            refused when the loaded `config.json` says otherwise.
    """

    source: str | None = None
    revision: str | None = None
    random: ModelShape | None = None
    shape: ModelShape | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.source is None) == (self.random is None):
            raise RecipeError(
                f"a model with source {self.source!r} and random {'given' if self.random else 'not given'}",
                "weights come from exactly one place",
                "give either a source (stage, folder or Hub id) or a `random:` shape",
            )
        return self


def _as_model(value: Any) -> Any:
    return {"source": value} if isinstance(value, str) else value


class Stage(Strict):
    """What every stage has.

    Attributes:
        name: the folder of the stage inside the run's folder; unique in the recipe.
        kind: which kind of stage it is.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    kind: str


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

    _coerce_model = field_validator("model", mode="before")(_as_model)


class PruneTarget(Strict):
    """What stays: explicit counts, or a sparsity that gives them.

    Attributes:
        num_layers: decoder layers; all of them when not given.
        hidden_size: width of the residual stream.
        num_heads: query heads a layer. Key-value heads are kept in proportion: heads are cut by key-value group.
        intermediate_size: neurons a layer.
        sparsity: percent of the layers' weights to remove. Heads, neurons and width each lose
            p' = 100 - round(100 sqrt(1 - p / 100)) percent, since each matrix is cut in both of its dimensions.
    """

    num_layers: int | None = Field(default=None, gt=0)
    hidden_size: int | None = Field(default=None, gt=0)
    num_heads: int | None = Field(default=None, gt=0)
    intermediate_size: int | None = Field(default=None, gt=0)
    sparsity: float | None = Field(default=None, ge=0, lt=100)

    @model_validator(mode="after")
    def _counts_or_sparsity(self) -> Self:
        counts = (self.hidden_size, self.num_heads, self.intermediate_size)
        if self.sparsity is not None and any(count is not None for count in counts):
            raise RecipeError(
                "a prune target with both a sparsity and explicit counts",
                "the sparsity already says how many heads, neurons and dimensions stay",
                "give one of them (num_layers may stand beside either)",
            )
        return self


class Prune(Stage):
    """Cut a model down to a smaller stock model.

    Attributes:
        model: the model to cut.
        data: a build_data stage whose training blocks measure importance; not needed for other scores.
        target: what stays.
        score: `gradient` is the paper's importance, `magnitude` and `random` are baselines.
        selection: `local` keeps the same counts in every layer, `global` ranks heads and neurons across layers and
            pads each layer with zeros to the widest (for study: the checkpoint does not shrink).
        depth: which layers stay: `symmetric` drops as many at the bottom as at the top, `importance` drops those
            whose heads and neurons score least.
        norm_compensation: `rms` rescales each RMSNorm for the narrower width; `none` is the published behaviour.
        scores: an earlier prune stage whose saved scores are used instead of a new pass over data.
        sequences: blocks that importance is averaged over.
        micro_batch_sequences: blocks of one gradient. The absolute value is taken per micro-batch and rank, as
            published, so the score depends on this number.
        sequence_length: tokens of one block; the store's when not given. Shorter blocks take less memory.
        precision: dtype of weights and activations.
        deepspeed: DeepSpeed JSON for the frozen model; beside the recipe, or one that minima ships.
        seed: of the blocks' order and of random scores.
    """

    kind: Literal["prune"]
    model: ModelInput
    data: str | None = None
    target: PruneTarget
    score: Literal["gradient", "magnitude", "random"] = "gradient"
    selection: Literal["local", "global"] = "local"
    depth: Literal["symmetric", "importance"] = "symmetric"
    norm_compensation: Literal["none", "rms"] = "none"
    scores: str | None = None
    sequences: int = Field(default=512, gt=0)
    micro_batch_sequences: int = Field(default=8, gt=0)
    sequence_length: int | None = Field(default=None, gt=1)
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    deepspeed: str = "teacher_zero3.json"
    seed: int = 776

    _coerce_model = field_validator("model", mode="before")(_as_model)

    @model_validator(mode="after")
    def _gradient_needs_data(self) -> Self:
        if self.score == "gradient" and self.scores is None and self.data is None:
            raise RecipeError(
                f"prune stage {self.name!r} scores by gradient but names no data",
                "importance is a gradient of the loss on text",
                "add `data:` with a build_data stage, reuse `scores:` of another stage, or choose another score",
            )
        return self


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

    _coerce_model = field_validator("model", "teacher", mode="before")(_as_model)

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


class Recipe(Strict):
    """A whole run.

    Attributes:
        name: of the run; its folder is `runs/NAME` unless `output` says otherwise.
        output: the run's folder; relative to where the command runs.
        launcher: which `launch/X.sh` starts the stages.
        ranks: processes on this machine; one for each GPU, or 2 without a GPU, when not given.
        stages: in the order in which they run; each reads earlier ones by name.
        summary: what `summary.json` holds: nested names, each a `STAGE.metric.path`, or a list of them to average.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    output: str | None = None
    launcher: Literal["local", "deepspeed", "torchrun"] = "deepspeed"
    ranks: int | None = Field(default=None, gt=0)
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
