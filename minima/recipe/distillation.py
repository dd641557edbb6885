"""The settings of a distil stage: what is learnt from the teacher, and where the teacher's weights live."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from minima.errors import RecipeError
from minima.recipe.base import ModelInput, Stage, as_model
from minima.recipe.loss_weights import Weight, WeightSchedule, weight_at
from minima.recipe.training import Training

Placement = Literal["replica", "zero3_node", "zero3", "tensor_parallel"]
Offload = Literal["none", "cpu", "nvme"]

# The names of `losses.divergences`, which cannot be imported here: it needs torch.
Divergence = Literal[
    "forward_kl", "reverse_kl", "jensen_shannon", "skew_forward_kl", "skew_reverse_kl", "total_variation"
]
_USERS = {"beta": ("jensen_shannon",), "alpha": ("skew_forward_kl", "skew_reverse_kl")}

# Keys of a teacher that decide where its weights are and how often they travel, never what it predicts.
PLACING = frozenset({"placement", "offload", "nvme_path", "tensor_parallel_ranks", "window_micro_batches", "deepspeed"})


class Teacher(ModelInput):
    """The frozen model, and where its weights live. A plain string in a recipe is a `source`.

    Of the keys below, only `precision` changes the result beyond rounding; the others may change between two starts.

    Attributes:
        placement: `replica`, a whole copy on each rank; `zero3_node`, sharded over the ranks of each node, so that no
            weights travel between nodes; `zero3`, sharded over all ranks; `tensor_parallel`, each matrix split over
            the ranks of a node, which run their batches together; `auto`, the first of these that fits, else shards in
            host memory, else on NVMe. The choice and its reason are printed.
        offload: where the shards of `zero3_node` and `zero3` lie: `none`, on the device; `cpu`, in host memory;
            `nvme`, in files under `nvme_path`.
        nvme_path: a folder on a local disk, for `offload: nvme`; `auto` uses NVMe only if it is given.
        tensor_parallel_ranks: number of ranks that one copy is split over; all ranks of a node when not given.
        window_micro_batches: how many micro-batches of a step run through a layer before the next layer is gathered.
            Divides a sharded or offloaded teacher's traffic by that number, and keeps the hidden states of that many
            micro-batches. When not given: 1 if no weights travel, else all micro-batches of a step, up to 8.
        precision: dtype of the weights; the student's when not given.
        deepspeed: DeepSpeed JSON, for any placement but `auto`; when not given, the shipped one:
            `teacher_PLACEMENT.json`, `teacher_cpu.json` or `teacher_nvme.json`.
    """

    placement: Literal["auto", "replica", "zero3_node", "zero3", "tensor_parallel"] = "auto"
    offload: Offload = "none"
    nvme_path: str | None = None
    tensor_parallel_ranks: int | None = Field(default=None, gt=0)
    window_micro_batches: int | None = Field(default=None, gt=0)
    precision: Literal["float32", "bfloat16"] | None = None
    deepspeed: str | None = None

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.offload != "none" and self.placement not in ("zero3_node", "zero3"):
            raise RecipeError(
                f"a teacher with placement {self.placement} and offload {self.offload}",
                "only shards can be offloaded: whole copies and split matrices stay on the device",
                "set placement to zero3_node or zero3, or leave offload out (`auto` makes its own choice)",
            )
        if self.offload == "nvme" and self.nvme_path is None:
            raise RecipeError(
                "a teacher with offload nvme and no nvme_path",
                "its shards are written there as files, and a network disk or the wrong one would be slow or full",
                "set nvme_path to a folder on a local NVMe disk",
            )
        if self.nvme_path is not None and self.offload != "nvme" and self.placement != "auto":
            raise RecipeError(
                f"a teacher with nvme_path {self.nvme_path!r} and offload {self.offload}",
                "nothing would be written there",
                "set offload: nvme or placement: auto, or leave nvme_path out",
            )
        if self.tensor_parallel_ranks is not None and self.placement not in ("auto", "tensor_parallel"):
            raise RecipeError(
                f"a teacher with tensor_parallel_ranks {self.tensor_parallel_ranks} and placement {self.placement}",
                "it would have no effect",
                "set placement: tensor_parallel, or leave tensor_parallel_ranks out",
            )
        if self.deepspeed is not None and self.placement == "auto":
            raise RecipeError(
                f"a teacher with deepspeed {self.deepspeed!r} and placement auto",
                "a JSON fits one placement, and `auto` has not chosen one yet",
                "set placement to one of the others, or leave deepspeed out",
            )
        return self

    @staticmethod
    def shipped_json(placement: Placement, offload: Offload) -> str:
        """The DeepSpeed JSON that minima ships for a placement."""
        return f"teacher_{placement if offload == 'none' else offload}.json"


class Distil(Training, Stage):
    """Train a student on text and on a frozen teacher's predictions for it.

    Attributes:
        model: the student's starting weights.
        teacher: the frozen model, and where its weights live.
        data: a build_data stage, or the path of its folder.
        hard_weight: weight of the cross-entropy with the text. 0.5 as published. A number, or a `WeightSchedule`.
        soft_weight: weight of the divergence from the teacher. 0.5 as published. A number, or a `WeightSchedule`.
        temperature: divides both models' logits in the divergence, which is scaled by its square.
        divergence: how the student's predictions are compared with the teacher's; `forward_kl`, the cross-entropy with
            the teacher, as published. All are defined at `losses.linear_distillation_loss`.
        beta: the teacher's weight in the mixture of `jensen_shannon`; 0.5 when not given.
        alpha: the teacher's weight in the mixture of `skew_forward_kl`, the student's in that of `skew_reverse_kl`; 0.1
            when not given, as in their paper.
        top_k: keep only this many of the teacher's most likely tokens and treat all others as one; all when not given.
        top_p: keep only the fewest of the teacher's most likely tokens that together reach this probability, and treat
            all others as one; with `top_k`, whichever keeps fewer.
        chunk_tokens: number of tokens whose logits are in memory at a time.
    """

    kind: Literal["distil"]
    model: ModelInput
    teacher: Teacher
    data: str
    hard_weight: Weight = 0.5
    soft_weight: Weight = 0.5
    temperature: float = Field(default=1.0, gt=0)
    divergence: Divergence = "forward_kl"
    beta: float | None = Field(default=None, gt=0, lt=1)
    alpha: float | None = Field(default=None, gt=0, lt=1)
    top_k: int | None = Field(default=None, gt=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    chunk_tokens: int = Field(default=1024, gt=0)

    _coerce_model = field_validator("model", "teacher", mode="before")(as_model)

    @field_validator("hard_weight", "soft_weight")
    @classmethod
    def _plain(cls, weight: float | WeightSchedule) -> float | WeightSchedule:
        return weight_at(weight, 0, 1) if _constant(weight) else weight  # however it is written, it is the same stage

    @model_validator(mode="after")
    def _some_weight(self) -> Self:
        if self.hard_weight == self.soft_weight == 0:
            raise RecipeError(
                f"distil stage {self.name!r} has hard_weight 0 and soft_weight 0",
                "nothing would be learnt",
                "give at least one of them a weight above 0",
            )
        return self

    @model_validator(mode="after")
    def _used(self) -> Self:
        for name, users in _USERS.items():
            if getattr(self, name) is not None and self.divergence not in users:
                raise RecipeError(
                    f"distil stage {self.name!r} has {name} {getattr(self, name)} and divergence {self.divergence}",
                    f"only {' and '.join(users)} can use it, so it would have no effect",
                    f"leave {name} out, or set divergence to {' or '.join(users)}",
                )
        given = [name for name in ("beta", "alpha", "top_k", "top_p") if getattr(self, name) is not None]
        given += ["divergence"] if self.divergence != "forward_kl" else []
        if given and self.soft_weight == 0:
            raise RecipeError(
                f"distil stage {self.name!r} has soft_weight 0 and {' and '.join(given)}",
                "the teacher has no part in this loss, so it would have no effect",
                f"leave {' and '.join(given)} out, or give soft_weight a value above 0",
            )
        return self

    @property
    def frozen_model(self) -> ModelInput | None:
        return self.teacher if self.soft_weight else None

    def soft_options(self) -> dict[str, Any]:
        """The settings of the teacher's part as keywords of the loss, without those left to its defaults."""
        options = {name: getattr(self, name) for name in ("divergence", "beta", "alpha", "top_k", "top_p")}
        return {name: value for name, value in options.items() if value is not None}


def _constant(weight: float | WeightSchedule) -> bool:
    """Whether the weight is the same at every step."""
    if not isinstance(weight, WeightSchedule):
        return True
    return len({value for value in (weight.value, weight.start, weight.peak, weight.end) if value is not None}) == 1
