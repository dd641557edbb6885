"""Which files make up a model folder in Hugging Face's layout. No torch."""

import json
from pathlib import Path

TOKENIZER_FILES = (
    "tokenizer*",
    "spiece.model",
    "chat_template*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.*",
)
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")  # a tokenizer has one of them


def model_folder(folder: Path) -> Path:
    """The folder that plain transformers loads: an export stage keeps it as `model/` inside its own.

    Args:
        folder: an export stage's folder, or one in Hugging Face's layout, which is given back as it is.
    """
    inner = folder / "model"
    return inner if (inner / "config.json").is_file() and not (folder / "config.json").is_file() else folder


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer in a folder says how a conversation is written down."""
    settings = folder / "tokenizer_config.json"
    return any(folder.glob("chat_template*")) or (
        settings.is_file() and bool(json.loads(settings.read_text(encoding="utf-8")).get("chat_template"))
    )
