"""The `generation_config.json` of an export: which tokens end a text, and the default sampling settings."""

from pathlib import Path
from typing import Any

from minima.models.layout import has_chat_template

# For a chat model; a base model decodes greedily. 0.7 is the temperature that the paper's chat model is used with.
CHAT_SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}


def generation_settings(config: dict[str, Any], tokenizer: Path | None, *, chat: bool) -> dict[str, Any]:
    """Content of a `generation_config.json`.

    It lists every token that may end a text: the configuration's end token, the tokenizer's, and those that end an
    assistant's turn in the chat template. The padding token is set here, where `generate` looks for it, and not in
    `config.json`, where it would keep `nn.Embedding` from ever training that token's row.

    Args:
        config: content of the model's config.json.
        tokenizer: folder of its tokenizer; None if it has none.
        chat: whether the model was trained on conversations; if it also has a chat template, it samples by default.
    """
    begin, ends, padding, template = config.get("bos_token_id"), _listed(config.get("eos_token_id")), None, False
    if tokenizer is not None and any(tokenizer.glob("tokenizer*")):
        from minima.data.chats.templates import stop_ids
        from minima.data.tokenizer import load_tokenizer

        loaded = load_tokenizer(tokenizer)
        template = has_chat_template(tokenizer)
        begin = loaded.bos_token_id if begin is None else begin
        ends += [loaded.eos_token_id, *(stop_ids(loaded) if template else [])]
        padding = loaded.pad_token_id
        if padding is None and loaded.unk_token_id != loaded.eos_token_id:  # as in the exported tokenizer
            padding = loaded.unk_token_id
    ends = list(dict.fromkeys(ends))
    found: dict[str, Any] = {"bos_token_id": begin}
    if ends:
        padding = ends[0] if padding is None else padding
        found |= {"eos_token_id": ends[0] if len(ends) == 1 else ends, "pad_token_id": padding}
    found = {name: value for name, value in found.items() if value is not None}
    return found | (CHAT_SAMPLING if chat and template else {})


def _listed(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]
