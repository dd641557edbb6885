"""The settings of a prune stage."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from minima.errors import RecipeError
from minima.recipe.base import ModelInput, Stage, Strict, as_model


class PruneTarget(Strict):
    """What stays: explicit counts, or a sparsity that determines them.

    Attributes:
        num_layers: decoder layers; all of them when not given.
        hidden_size: width of the residual stream.
        num_heads: query heads per layer. Key-value heads are kept in proportion: heads are cut by key-value group.
        intermediate_size: neurons per layer.
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
                "give one of them (num_layers may be given with either)",
            )
        return self


class Prune(Stage):
    """Cut a model down to a smaller stock model.

    Attributes:
        model: the model to cut.
        data: a build_data stage on whose training blocks importance is measured; needed for `score: gradient`, unless
            `scores` is given.
        target: what stays.
        score: `gradient` is the paper's importance; `magnitude` and `random` are baselines.
        selection: `local` keeps the same counts in every layer. `global` ranks heads and neurons across layers and
            pads each layer with zeros to the widest, so the checkpoint does not shrink: for experiments only. GPT-NeoX
            and GPT-2 refuse `global` with a `sparsity`: it cuts the width, and their heads, padded or not, must fill
            the width exactly. Give them explicit counts that leave `hidden_size` as it is.
        depth: which layers go: `symmetric` drops as many at the bottom as at the top, `importance` drops those whose
            heads and neurons have the lowest scores.
        norm_compensation: `rms` rescales each RMSNorm for the narrower width; `none` is the published behaviour.
        scores: an earlier prune stage whose saved scores are used instead of a new pass over data.
        sequences: number of blocks over which importance is averaged.
        micro_batch_sequences: blocks per gradient. The absolute value is taken per micro-batch and rank, as
            published, so the score depends on this number.
        sequence_length: tokens per block; the data's own length when not given. Shorter blocks take less memory.
        precision: dtype of weights and activations.
        deepspeed: DeepSpeed JSON for the measured model: a file next to the recipe, or one that ships with minima.
        seed: seed for the order of the blocks and for random scores.
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
    deepspeed: str = "prune_zero3.json"
    seed: int = 776

    _coerce_model = field_validator("model", mode="before")(as_model)

    @model_validator(mode="after")
    def _gradient_needs_data(self) -> Self:
        if self.score == "gradient" and self.scores is None and self.data is None:
            raise RecipeError(
                f"prune stage {self.name!r} has score: gradient but no data",
                "importance is a gradient of the loss on text",
                "add `data:` with a build_data stage, reuse `scores:` of another stage, or choose another score",
            )
        return self
