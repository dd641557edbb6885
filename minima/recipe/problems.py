"""What pydantic found wrong with a recipe, a study or a cluster file, in words for the person who wrote it."""

import typing
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from minima.errors import MinimaError
from minima.recipe.overrides import nearest

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
CELL_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.]*$"  # `-` joins the names of a study's cell
REPOSITORY = r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$"
SLURM_WORD = r"^[A-Za-z0-9_.,:=+/@%&|*()\[\]-]+$"  # Slurm has its own rules for quotes, backslashes and # in #SBATCH
SLURM_OPTION = r"^--[a-z][a-z-]*(=[^\r\n\x00]*)?$"
LINE = r"^[^\r\n\x00]*$"
_RULES = {  # what a pattern asks for
    NAME: "letters, digits, '_', '.' and '-', the first one a letter or a digit",
    CELL_NAME: "letters, digits, '_' and '.', the first one a letter or a digit",
    REPOSITORY: "OWNER/NAME, each of letters, digits, '_', '.' and '-', the first one a letter or a digit",
    SLURM_WORD: "one word of letters, digits and _ . , : = + / @ % & | * ( ) [ ] -",
    SLURM_OPTION: "one option of sbatch, written --name or --name=value, on one line",
    LINE: "one line",
}
_WANTED = {  # by the start of pydantic's error type
    "int_": "must be a whole number",
    "float_": "must be a number",
    "bool_": "must be true or false",
    "string_type": "must be text",
    "list_type": "must be a list",
    "dict_type": "must be a block of keys",
    "model_type": "must be a block of keys",
}
_ELSEWHERE = {  # our names, and those that other trainers and configurations use for the same thing
    "activation_checkpointing": "gradient_checkpointing recompute",
    "batch_sequences": "batch_size train_batch_size global_batch_size",
    "checkpoint_every_steps": "save_steps save_interval",
    "compile": "torch_compile",
    "data": "dataset datasets train_dataset",
    "epochs": "num_train_epochs num_epochs",
    "evaluate_every_steps": "eval_steps eval_interval",
    "gradient_clip": "max_grad_norm grad_clip gradient_clipping",
    "keep_checkpoints": "save_total_limit",
    "learning_rate": "lr peak_lr",
    "log_every_steps": "logging_steps log_interval",
    "max_positions": "max_position_embeddings",
    "micro_batch_sequences": "per_device_train_batch_size micro_batch_size",
    "model": "model_name_or_path",
    "num_heads": "num_attention_heads n_head",
    "num_layers": "num_hidden_layers n_layer",
    "precision": "bf16 dtype torch_dtype",
    "schedule": "lr_scheduler_type lr_scheduler",
    "sequence_length": "seq_len seq_length max_length max_seq_length block_size",
    "steps": "max_steps num_steps train_iters",
    "teacher": "teacher_model_name_or_path teacher_model",
    "vocabulary_size": "vocab_size",
    "warmup_fraction": "warmup_ratio",
}


def problem(detail: Any, root: type[BaseModel]) -> str:
    """What is wrong with one value, without its place.

    Args:
        detail: one of the errors of a pydantic `ValidationError`.
        root: the class that the whole file was read as.
    """
    value = detail["input"]
    if detail["type"] == "extra_forbidden":
        key = str(detail["loc"][-1])
        known = _known_names(root, detail["loc"][:-1])
        meant = [name for name, others in _ELSEWHERE.items() if key in others.split() and name in known]
        close = f"; did you mean {meant[0]!r}?" if meant else nearest(key, known)
        return f"no such key{close or '; known keys are ' + ', '.join(known)}"
    if detail["type"] in ("union_tag_invalid", "union_tag_not_found"):
        tag = detail["ctx"].get("tag")
        kinds = [kind.strip(" '") for kind in detail["ctx"].get("expected_tags", "").split(",") if kind.strip()]
        if tag is None:
            return "the stage has no kind"
        return f"kind {tag!r} is not known{nearest(tag, kinds)} (kinds are {', '.join(kinds)})"
    if detail["type"] == "missing":
        return "is missing"
    if detail["type"] == "string_pattern_mismatch":
        return f"must be {_RULES[detail['ctx']['pattern']]}, not {value!r}"
    inner = detail.get("ctx", {}).get("error")
    if isinstance(inner, MinimaError):
        return f"{inner.what} ({inner.why}; {inner.do})"
    wanted = next((text for start, text in _WANTED.items() if detail["type"].startswith(start)), None)
    message = wanted or detail["msg"].replace("Input should be", "must be").removeprefix("Value error, ")
    return f"{message[:1].lower() + message[1:]}, not {value!r}" if len(repr(value)) < 80 else message


def _known_names(root: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """The fields of the block at a pydantic location in a file that was read as `root`."""
    blocks: list[type[BaseModel]] = [root]
    keyed = False  # whether this part is a key that the user chose, of a dict of blocks
    for part in location:
        if isinstance(part, int) or keyed:
            keyed = False
            continue
        holders = [block for block in blocks if part in block.model_fields]
        tagged = [block for block in blocks if _kind(block) == part or block.__name__ == part]
        if tagged:
            blocks = tagged
        elif holders:
            annotations = [block.model_fields[part].annotation for block in holders]
            blocks = [inner for annotation in annotations for inner in _models(annotation)]
            keyed = any(typing.get_origin(annotation) is dict for annotation in annotations)
    return sorted({name for block in blocks for name in block.model_fields})


def _kind(block: type[BaseModel]) -> str | None:
    field = block.model_fields.get("kind")
    return (typing.get_args(field.annotation) or (None,))[0] if field else None


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in typing.get_args(annotation) for model in _models(inner)]
