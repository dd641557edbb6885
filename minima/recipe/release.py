"""The settings of the stages that measure, write and publish a finished model."""

from typing import Literal, Self

from pydantic import Field, model_validator

from minima.errors import RecipeError
from minima.recipe.base import Stage, Strict
from minima.recipe.problems import REPOSITORY

SUITE_NAMES = ("mmlu", "ceval", "drop", "humaneval", "bbh", "gsm8k")
_BESIDE_SCORES = ("left_out", "answers")  # what a benchmark stage's metrics hold besides scores


class Evaluate(Stage):
    """Held-out loss, perplexity and bits per byte of models, and their agreement with a teacher.

    Bits per byte are the loss in bits divided by the text's UTF-8 bytes per token; a document's end token has no bytes,
    but predicting it costs bits. On conversations, the loss is on the assistant's text only.

    Attributes:
        models: earlier stages (`student@12000` for one checkpoint), folders or Hub ids.
        teacher: the model that the others are compared with (KL and top-1 agreement); no comparison when not given.
        data: a build_data stage, whose held-out blocks are used.
        sequences: use only this many held-out blocks, the first ones; all when not given. See `held_out_tokens` for
            what the first ones hold.
        micro_batch_sequences: blocks per forward pass on one rank.
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
    """Write a folder that plain transformers can load.

    Attributes:
        model: the trained stage (`student@12000` for one checkpoint).
        dtype: dtype of the written weights; the dtype that the stage trained in when not given.
        shard_bytes: start a new file when the current one would grow past this many bytes.
        licence: licence identifier for the model card.
        languages: ISO 639 codes for the model card.
        datasets: Hub ids of datasets for the model card, besides those that the recipe names.
        base_model: Hub id of the model it was made from, for the model card.
        deepspeed: DeepSpeed JSON for the two models whose logits are compared.
    """

    kind: Literal["export"]
    model: str
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    shard_bytes: int = Field(default=4_000_000_000, gt=0)
    licence: str | None = None
    languages: list[str] = []
    datasets: list[str] = []
    base_model: str | None = None
    deepspeed: str = "teacher_zero3.json"


class Answers(Strict):
    """Answers to a judge's questions, in the judge's own file format.

    Attributes:
        format: `mt_bench` and `mt_bench_zh` (FastChat's answer files) or `alpaca_eval` (its outputs).
        questions: the judge's question file: JSON lines, or a JSON list.
        max_new_tokens: maximum number of tokens in one answer.
    """

    format: Literal["mt_bench", "mt_bench_zh", "alpaca_eval"]
    questions: str
    max_new_tokens: int = Field(default=1024, gt=0)


class Benchmark(Stage):
    """Run the standard harness (lm-eval) on an exported folder, and write answer files for judges.

    Attributes:
        model: an export stage, a folder in Hugging Face's layout, or a Hub id.
        suite: `minima` is what the paper reports: MMLU 5-shot, C-Eval 5-shot, DROP 3-shot, HumanEval 0-shot, BBH
            3-shot and GSM8K 8-shot. HumanEval executes code that the model wrote, so it is left out, with a warning,
            unless `minima run` is given `--allow-code-execution`.
        tasks: further tasks, by names that lm-eval or `task_folder` knows; the suite's own names are not allowed.
        task_folder: a folder of lm-eval task files for data on this machine, which take precedence over lm-eval's own;
            those that ship with minima under `assets/tasks` are always known.
        data_folder: where the suite's items are on this machine (see `tools/fetch_benchmarks.py`); when not given, they
            come from the Hub.
        num_fewshot: number of examples in the prompt, for `tasks`; each task's own when not given.
        limit: at most this many items of each task; all when not given. A limited score is marked as such.
        batch_size: sequences per forward pass.
        chat: put prompts through the tokenizer's chat template.
        dtype: dtype of the weights; as stored when not given.
        answers: answer files to generate.
        seed: seed for the few-shot examples and for sampling.
    """

    kind: Literal["benchmark"]
    model: str
    suite: Literal["minima"] | None = None
    tasks: list[str] = []
    task_folder: str | None = None
    data_folder: str | None = None
    num_fewshot: int | None = Field(default=None, ge=0)
    limit: int | None = Field(default=None, gt=0)
    batch_size: int = Field(default=8, gt=0)
    chat: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    answers: list[Answers] = []
    seed: int = 1234

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.suite is None and not self.tasks and not self.answers:
            raise RecipeError(
                f"benchmark stage {self.name!r} names no suite, no tasks and no answers",
                "nothing would be measured",
                "give `suite: minima`, a list of `tasks`, or `answers`",
            )
        idle = ["num_fewshot"] if self.num_fewshot is not None and not self.tasks else []
        if self.suite is None and not self.tasks:
            idle += [key for key in ("task_folder", "data_folder", "limit") if getattr(self, key) is not None]
        if idle:
            raise RecipeError(
                f"benchmark stage {self.name!r} sets {', '.join(idle)}, which nothing in it uses",
                "the result would not be what the recipe seems to say",
                "remove it, or name the `tasks` that it is for (`suite: minima` has its own number of examples)",
            )
        return self

    @model_validator(mode="after")
    def _each_format_once(self) -> Self:
        formats = [answers.format for answers in self.answers]
        if len(set(formats)) < len(formats):
            raise RecipeError(
                f"answers of benchmark stage {self.name!r} name {' and '.join(formats)}",
                "each format has one file, so the second would overwrite the first",
                "write a benchmark stage for each question file",
            )
        return self

    @model_validator(mode="after")
    def _each_name_once(self) -> Self:
        taken = {*_BESIDE_SCORES}
        if self.suite is not None:
            taken |= {name + end for name in SUITE_NAMES for end in ("", "_stand_in")}
        twice = [task for number, task in enumerate(self.tasks) if task in taken or task in self.tasks[:number]]
        if twice:
            raise RecipeError(
                f"tasks of benchmark stage {self.name!r} name {', '.join(dict.fromkeys(twice))}, which its results "
                "already contain",
                "results are kept by name, so one of the two would be lost",
                "name each task once, rename your own task, and put a variant of a suite's task into a benchmark stage "
                "of its own",
            )
        return self


class Publish(Stage):
    """Push an exported folder to the Hub.

    Attributes:
        model: an export stage, or a folder written by one.
        repo: the repository's name on the Hub: `organisation/name`.
        private: whether a new repository is private; an existing one stays as it is.
        revision: branch to push to.
        message: commit message.
    """

    kind: Literal["publish"]
    model: str
    repo: str = Field(pattern=REPOSITORY)
    private: bool = True
    revision: str | None = None
    message: str | None = None
