"""The typed recipe: one file holds a whole run as a list of stages. No torch: it parses on a login node."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from minima.errors import RecipeError
from minima.recipe.base import ModelInput, Stage, Strict, as_model
from minima.recipe.chat import Align, Instruct
from minima.recipe.data import Source, TokenizerTraining
from minima.recipe.distillation import Distil
from minima.recipe.overrides import nearest
from minima.recipe.problems import NAME
from minima.recipe.pruning import Prune
from minima.recipe.release import Benchmark, Evaluate, Export, Publish
from minima.recipe.training import Training
from minima.recipe.vocabulary import ExpandVocabulary

_EMBEDDED = {"text": ("sotu", "poems"), "conversations": ("chat",), "preferences": ("preferences",)}


class BuildData(Stage):
    """Turn text, conversations or preference pairs into blocks of tokens.

    Attributes:
        sources: where documents come from, each with its weight in the mixture.
        format: `text`; `conversations`, each whole in one block, the assistant's tokens marked; or `preferences`,
            pairs of answers to the same conversation, both in one block.
        tokenizer: the name of an earlier stage, a folder, a Hub id, or a block that says how to train one.
        chat_template: template for conversations and preferences: `minichat`, `own` for the tokenizer's, or the path of
            a Jinja file. When not given, the tokenizer's own if it has one, else `minichat`. It is written into the
            tokenizer.
        sequence_length: tokens per block. Blocks of text are cut from the stream of documents, each closed by the end
            token; a remainder of less than a block is counted and dropped. Conversations are not cut: the rest of a
            block is padded.
        add_bos_token: begin each document of text with the tokenizer's begin-of-sequence token. When not given, it is
            added if the tokenizer adds one by default (Llama's and Mistral's tokenizer.json do; Qwen2 and GPT-2 do not,
            nor does one that is trained here). If a block cuts a document, the rest of it does not get another one. In
            conversations and preferences, the chat template decides.
        document_mask: tokens attend only within their own document, in every stage that reads the blocks, and positions
            restart at each document. False is the published behaviour. Always true for conversations and preferences.
        tokens: how many training tokens to write, over all sources; when not given, every token once or, if a source
            has a weight, until each source has been read at least once.
        held_out_fraction: fraction of documents that are held out, chosen by a hash of their text. Sources are mixed in
            the held-out text as in the training text. If the held-out documents amount to less than a block, a
            fraction given in the recipe is refused; with the default, nothing is held out, with a warning.
        held_out_tokens: keep only this many held-out tokens, the first ones, in whole blocks. If no source has a
            weight, sources take turns of equal size, so small sources have a larger share of the first tokens than of
            all.
        processes: number of worker processes; one per core when not given.
        shard_tokens: tokens per shard file, rounded down to whole blocks.
        seed: seed for the order of documents and the choice of held-out ones.
    """

    kind: Literal["build_data"]
    sources: list[Source] = Field(min_length=1)
    format: Literal["text", "conversations", "preferences"] = "text"
    tokenizer: str | TokenizerTraining
    chat_template: str | None = None
    sequence_length: int = Field(gt=1)
    add_bos_token: bool | None = None
    document_mask: bool = True
    tokens: int | None = Field(default=None, gt=0)
    held_out_fraction: float = Field(default=0.005, ge=0, lt=1)
    held_out_tokens: int | None = Field(default=None, gt=0)
    processes: int | None = Field(default=None, gt=0)
    shard_tokens: int = Field(default=2**28, gt=0)
    seed: int = 776

    @property
    def trains_tokenizer(self) -> bool:
        """Whether the stage makes the tokenizer that it encodes with."""
        return isinstance(self.tokenizer, TokenizerTraining)

    @model_validator(mode="after")
    def _fits_its_format(self) -> Self:
        chat = self.format != "text"
        if not chat and self.chat_template is not None:
            raise RecipeError(
                f"build_data stage {self.name!r} gives a chat_template for text",
                "text has no turns, so it would not be used",
                "set `format: conversations`, or leave chat_template out",
            )
        if self.add_bos_token is not None and (chat or (self.add_bos_token and self.trains_tokenizer)):
            raise RecipeError(
                f"build_data stage {self.name!r} sets add_bos_token for {self.format if chat else 'its own tokenizer'}",
                "the chat template writes what a conversation begins with"
                if chat
                else "a tokenizer that is trained here adds none by default: the exported model would never see one",
                "leave add_bos_token out",
            )
        if chat and not self.document_mask:
            raise RecipeError(
                f"build_data stage {self.name!r} asks for {self.format} without a document mask",
                "an answer would be learnt from another conversation's question",
                "leave document_mask out",
            )
        if chat and self.trains_tokenizer:
            raise RecipeError(
                f"build_data stage {self.name!r} would train a tokenizer on {self.format}",
                "a chat model uses the tokenizer that its base was trained with",
                "name the stage or the folder of that tokenizer",
            )
        wrong = [source.label for source in self.sources if source.embedded not in (None, *_EMBEDDED[self.format])]
        if wrong:
            raise RecipeError(
                f"build_data stage {self.name!r} reads {', '.join(wrong)} as {self.format}",
                "its records are of another kind",
                "text is embedded as sotu and poems, conversations as chat, preference pairs as preferences",
            )
        idle = [
            source.label for source in self.sources if chat and source.field != Source.model_fields["field"].default
        ]
        if idle:
            raise RecipeError(
                f"build_data stage {self.name!r} gives {', '.join(idle)} a field, for {self.format}",
                "their layout is recognised from each record, so it would have no effect",
                "leave field out; the documentation lists the known layouts",
            )
        return self

    @model_validator(mode="after")
    def _holds_a_block(self) -> Self:
        for name in ("tokens", *(["held_out_tokens"] if self.held_out_fraction else [])):
            asked = getattr(self, name)
            if asked is not None and asked < self.sequence_length:
                raise RecipeError(
                    f"build_data stage {self.name!r} has {name}: {asked}, less than one block of "
                    f"{self.sequence_length} tokens",
                    "data is written in whole blocks, so there would be none",
                    f"raise `{name}` to {self.sequence_length} or more, leave it out, or shorten `sequence_length`",
                )
        return self


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


AnyTraining = Adapt | Distil | Instruct | Align
AnyStage = Annotated[
    BuildData | ExpandVocabulary | Adapt | Prune | Distil | Instruct | Align | Evaluate | Export | Benchmark | Publish,
    Field(discriminator="kind"),
]


RESERVED_NAMES = frozenset(
    {"lock", "logs", "cache", "cluster", "cells", "recipe.yaml", "summary.json", "hub.json"}
)  # the run's own, next to the stages' folders


class Recipe(Strict):
    """A whole run.

    Attributes:
        name: the run's name; its folder is `runs/NAME` unless `output` says otherwise.
        output: the run's folder, relative to where the command runs.
        launcher: which `launch/X.sh` starts the stages: from a `launch/` folder next to the recipe, or a shipped one.
        ranks: processes that `minima run` starts on this machine, or on each machine of MINIMA_HOSTFILE (a launcher
            started by hand reads MINIMA_RANKS instead). When not given: what that file says, else one per GPU, or 2
            without a GPU.
        max_ranks: at most this many if `ranks` is not given; for runs that are too small for all GPUs.
        stages: the stages in the order in which they run; each reads earlier ones by name.
        summary: what `summary.json` holds besides its own `tokens`, `seconds` and `export`: nested names, each with a
            `STAGE.metric.path`, or a list of them to average.
    """

    name: str = Field(pattern=NAME)
    output: str | None = None
    launcher: str = Field(default="deepspeed", pattern=NAME)
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
                "the run's folder has a file or folder of its own by that name",
                "rename the stage",
            )
        return self

    @property
    def folder(self) -> Path:
        """The run's folder, relative to where the command runs."""
        return Path(self.output or f"runs/{self.name}").expanduser()

    def select(self, names: Sequence[str] | None) -> list[AnyStage]:
        """The stages with these names, in the recipe's order; all stages for None.

        Raises:
            RecipeError: a name is no stage of the recipe, or there are no names.
        """
        if names is None:
            return list(self.stages)
        wanted = {self.stage(name).name for name in names}
        if not wanted:
            raise RecipeError("no stages are chosen", "nothing would run", "name stages, or leave --stages out for all")
        return [stage for stage in self.stages if stage.name in wanted]

    def stage(self, name: str) -> AnyStage:
        """The stage called `name`.

        Raises:
            RecipeError: there is none.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        names = [stage.name for stage in self.stages]
        raise RecipeError(
            f"no stage is called {name!r}{nearest(name, names)}",
            "only stages of the recipe can run",
            f"choose among {', '.join(names)}",
        )
