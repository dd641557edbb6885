"""The base classes of a recipe's blocks."""

from collections.abc import Sequence
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from minima.errors import RecipeError, ShapeError
from minima.models.shape import ModelShape
from minima.recipe.problems import NAME

# Fields that identify a model; and those that also enter counts, but that a `shape:` often omits: only reported.
_IDENTIFYING = ("family", "vocabulary_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
_COUNTED = ("num_key_value_heads", "head_size", "tied")


class Strict(BaseModel):
    """A block that refuses unknown keys, infinite or NaN numbers, and `true` where a number is meant."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, given: Any) -> Any:
        """Refuse true and false for numbers: YAML reads `on` and `yes` as true, and true is 1 to Python."""
        for name, value in given.items() if isinstance(given, dict) else ():
            field = cls.model_fields.get(str(name))
            if isinstance(value, bool) and field is not None and not _takes_switch(field.annotation):
                raise RecipeError(
                    f"{name} is {str(value).lower()}",
                    "it is not a switch: YAML reads on, yes and true alike, but this key takes a number or text",
                    f"give {name} the intended value, or leave it out",
                )
        return given


def _takes_switch(annotation: Any) -> bool:
    """Whether a field accepts true and false, possibly among other types."""
    return annotation in (bool, Any) or any(map(_takes_switch, get_args(annotation)))


class ModelInput(Strict):
    """Where a model's weights come from. A plain string in a recipe is a `source`.

    Attributes:
        source: the name of an earlier stage (`student`, or `student@12000` for the checkpoint after that step), a
            folder in Hugging Face's layout, or a Hub id.
        revision: branch, tag or commit on the Hub; its default branch when not given.
        random: start from random weights of this shape instead. A tensor's values depend only on the run's seed and
            the tensor's name, so they are the same on any number of ranks.
        shape: the expected shape of the source. Lets `--dry-run` and `minima plan` work without the model on this
            machine. The run is refused if the source's `config.json` is that of another model.
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

    def check_shape(self, found: ModelShape, name: str) -> str:
        """Refuse weights of a model other than the one that the recipe's `shape:` describes.

        Args:
            found: shape of the weights.
            name: what to call them in an error.

        Returns:
            Other differences, which make plans without the weights wrong; empty if there are none.

        Raises:
            ShapeError: names each number that differs.
        """
        if wrong := self._differences(found, _IDENTIFYING):
            raise ShapeError(
                f"{name}: {wrong}",
                "the run was planned for another model",
                "correct the recipe's `shape:` block, or use the model that it describes",
            )
        return self._differences(found, _COUNTED)

    def _differences(self, found: ModelShape, fields: Sequence[str]) -> str:
        pairs = [(field, getattr(found, field), getattr(self.shape, field, None)) for field in fields]
        wrong = [f"{field} is {own}, but the recipe says {said}" for field, own, said in pairs if own != said]
        return "; ".join(wrong) if self.shape is not None else ""


def as_model(value: Any) -> Any:
    """Turn a plain string in a recipe into the `source` that it stands for."""
    return {"source": value} if isinstance(value, str) else value


class Stage(Strict):
    """The keys of every stage.

    Attributes:
        name: name of the stage and of its folder inside the run's folder; unique in the recipe.
        kind: the kind of stage.
    """

    name: str = Field(pattern=NAME)
    kind: str
