"""The settings of the stages that make a chat model: instruction tuning and preference optimisation."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from minima.errors import RecipeError
from minima.recipe.base import ModelInput, Stage, as_model
from minima.recipe.training import Training


class Instruct(Training, Stage):
    """Train on conversations: the loss is on the assistant's text and its end marker only.

    Attributes:
        model: the weights to start from.
        data: a build_data stage with `format: conversations`, or the path of its folder.
        neftune_alpha: noise on the embeddings in training, uniform in +-alpha / sqrt(L D) for a conversation of L
            tokens and a width of D (Jain et al., "NEFTune", 2023, which suggests 5 to 15); 0 for none.
        chunk_tokens: number of tokens whose logits are in memory at a time.
    """

    kind: Literal["instruct"]
    model: ModelInput
    data: str
    neftune_alpha: float = Field(default=0.0, ge=0)
    chunk_tokens: int = Field(default=1024, gt=0)

    _coerce_model = field_validator("model", mode="before")(as_model)


class Align(Training, Stage):
    """Direct preference optimisation (Rafailov et al., 2023) against a frozen reference.

    `batch_sequences` counts blocks, each with as many preference pairs as fit; the loss is a mean over pairs.

    Attributes:
        model: the weights to start from.
        reference: the frozen reference; the starting weights when not given.
        data: a build_data stage with `format: preferences`, or the path of its folder.
        loss: `sigmoid` is DPO's loss, `ipo` that of Azar et al., 2023.
        beta: strength of the pull towards the reference; for `ipo`, its tau.
        label_smoothing: probability that a pair is labelled the wrong way round (conservative DPO); `sigmoid` only.
        length_normalised: use an answer's mean log-probability per token instead of its sum. True for `ipo` and
            False for `sigmoid` when not given.
        precompute_reference: run the reference once over all pairs before training, and cache its log-probabilities
            by content in the run's `cache/`. Its weights then take no memory while the student trains.
        chunk_tokens: number of tokens whose logits are in memory at a time.
        reference_precision: dtype of the reference's weights; the student's when not given.
        reference_deepspeed: DeepSpeed JSON for the frozen reference.
    """

    kind: Literal["align"]
    model: ModelInput
    reference: ModelInput | None = None
    data: str
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    beta: float = Field(default=0.1, gt=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    length_normalised: bool | None = None
    precompute_reference: bool = False
    chunk_tokens: int = Field(default=1024, gt=0)
    reference_precision: Literal["float32", "bfloat16"] | None = None
    reference_deepspeed: str = "teacher_zero3.json"

    _coerce_model = field_validator("model", "reference", mode="before")(as_model)

    @model_validator(mode="after")
    def _smoothing_is_used(self) -> Self:
        if self.label_smoothing and self.loss != "sigmoid":
            raise RecipeError(
                f"align stage {self.name!r} has label_smoothing {self.label_smoothing} with loss {self.loss!r}",
                "only the sigmoid loss uses it, so it would have no effect",
                "leave label_smoothing out, or set loss: sigmoid",
            )
        return self

    @property
    def frozen_model(self) -> ModelInput | None:
        return self.reference or self.model
