"""The distil stage: what is learnt from the teacher, and where the teacher lives meanwhile."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from minima.errors import RecipeError
from minima.recipe.base import ModelInput, Stage, as_model
from minima.recipe.training import Training

Placement = Literal["replica", "zero3_node", "zero3", "tensor_parallel"]
Offload = Literal["none", "cpu", "nvme"]

# Keys of a teacher that say where its weights are and how often they travel, never what it predicts.
PLACING = frozenset({"placement", "offload", "nvme_path", "tensor_parallel_ranks", "window_micro_batches", "deepspeed"})


class Teacher(ModelInput):
    """The frozen model, and where its weights live. A plain string in a recipe is a `source`.

    Nothing here but `precision` changes the result beyond rounding, so all else may change between two starts.

    Attributes:
        placement: `replica`, a whole copy on each rank; `zero3_node`, sharded over the ranks of each node, so that no
            weight travels between nodes; `zero3`, sharded over all ranks; `tensor_parallel`, each matrix split over
            the ranks of a node, which run their batches together; `auto`, the first of these that fits, then the
            host's memory, then NVMe: the choice and its reason are printed.
        offload: where the shards of `zero3_node` and `zero3` lie: `none` for the device, `cpu` for the host's memory,
            `nvme` for files under `nvme_path`.
        nvme_path: a folder on a local disk, for `offload: nvme`; `auto` takes NVMe only where it is given.
        tensor_parallel_ranks: ranks that one copy is split over; those of a node when not given.
        window_micro_batches: micro-batches of one step that one traversal of the layers serves. A sharded or offloaded
            teacher's traffic is divided by it, and so many micro-batches' hidden states are kept. When not given: 1
            where no weight travels, else all of a step's up to 8.
        precision: dtype of the weights; the student's when not given.
        deepspeed: DeepSpeed JSON of a placement that is named; the shipped one, `teacher_PLACEMENT.json`,
            `teacher_cpu.json` or `teacher_nvme.json`, when not given.
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
                "only shards can lie elsewhere: a whole copy or a split matrix is used where it is",
                "set placement to zero3_node or zero3, or leave offload out (`auto` finds its own)",
            )
        if self.offload == "nvme" and self.nvme_path is None:
            raise RecipeError(
                "a teacher with offload nvme and no nvme_path",
                "its shards become files there, and a network disk or the wrong one would be slow or full",
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
                "it would not be used",
                "set placement: tensor_parallel, or leave tensor_parallel_ranks out",
            )
        if self.deepspeed is not None and self.placement == "auto":
            raise RecipeError(
                f"a teacher with deepspeed {self.deepspeed!r} and placement auto",
                "a JSON fits one placement, and which one is taken is not known yet",
                "name the placement, or leave deepspeed out",
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
        teacher: the frozen model, and where it lives.
        data: a build_data stage, or the path of its folder.
        hard_weight: weight of the cross-entropy with the text. 0.5 as published.
        soft_weight: weight of the cross-entropy with the teacher. 0.5 as published.
        temperature: divides both models' logits in the soft part, which is scaled by its square.
        chunk_tokens: tokens whose logits exist at one time.
    """

    kind: Literal["distil"]
    model: ModelInput
    teacher: Teacher
    data: str
    hard_weight: float = Field(default=0.5, ge=0)
    soft_weight: float = Field(default=0.5, ge=0)
    temperature: float = Field(default=1.0, gt=0)
    chunk_tokens: int = Field(default=1024, gt=0)

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
