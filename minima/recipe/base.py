"""What every block of a recipe is made of."""

from collections.abc import Sequence
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from minima.errors import RecipeError, ShapeError
from minima.models.shape import ModelShape

# What makes it another model; and what else is counted, which a `shape:` often leaves out: a difference is only told.
_IDENTIFYING = ("family", "vocabulary_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
_COUNTED = ("num_key_value_heads", "head_size", "tied")


class Strict(BaseModel):
    """A block whose unknown keys are refused, numbers that are infinite or none, and `true` for a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, given: Any) -> Any:
        """YAML reads `on` and `yes` as true, and true is 1 to Python."""
        for name, value in given.items() if isinstance(given, dict) else ():
            field = cls.model_fields.get(str(name))
            if isinstance(value, bool) and field is not None and not _takes_switch(field.annotation):
                raise RecipeError(
                    f"{name} is {str(value).lower()}",
                    "it is no switch: YAML reads on, yes and true alike, and it takes a number or a text",
                    f"give {name} the value that is meant, or leave it out",
                )
        return given


def _takes_switch(annotation: Any) -> bool:
    """Whether a field is one of yes and no, by itself or among others."""
    return annotation in (bool, Any) or any(map(_takes_switch, get_args(annotation)))


class ModelInput(Strict):
    """Where a model's weights come from. A plain string in a recipe is a `source`.

    Attributes:
        source: the name of an earlier stage (`student`, or `student@12000` for the checkpoint after that step), a
            folder in Hugging Face's layout, or a Hub id.
        revision: branch, tag or commit on the Hub; its default branch when not given.
        random: start from random weights of this shape instead. Every tensor's values follow from the run's seed
            and the tensor's name alone, so they are the same on any number of ranks.
        shape: the expected shape of the source. Lets `--dry-run` and `minima plan` count a model that is not on this
            machine. Refused if the `config.json` is that of another model.
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
        """Refuse weights of another model than the recipe's `shape:` describes.

        Args:
            found: of the weights.
            name: what to call them.

        Returns:
            What else differs, so that what was planned without the weights was wrong; empty where nothing does.

        Raises:
            ShapeError: says each number that differs.
        """
        if wrong := self._differences(found, _IDENTIFYING):
            raise ShapeError(
                f"{name}: {wrong}",
                "the run was planned for another model",
                "correct the recipe's `shape:` block, or name the model that it describes",
            )
        return self._differences(found, _COUNTED)

    def _differences(self, found: ModelShape, fields: Sequence[str]) -> str:
        pairs = [(field, getattr(found, field), getattr(self.shape, field, None)) for field in fields]
        wrong = [f"{field} is {own}, the recipe says {said}" for field, own, said in pairs if own != said]
        return "; ".join(wrong) if self.shape is not None else ""


def as_model(value: Any) -> Any:
    """A plain string in a recipe as the `source` that it stands for."""
    return {"source": value} if isinstance(value, str) else value


class Stage(Strict):
    """What every stage has.

    Attributes:
        name: the folder of the stage inside the run's folder; unique in the recipe.
        kind: which kind of stage it is.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    kind: str
