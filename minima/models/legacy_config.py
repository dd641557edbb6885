"""One config.json that two generations of transformers read alike: 5.x's names and the last 4.x's. No torch."""

from typing import Any

DEFAULT_ROPE_THETA = 10000.0  # `PreTrainedConfig.default_theta` of transformers 5, for each family that rotates here
DEFAULT_ROTARY_SHARE = 0.25  # GPTNeoXConfig: the share of a head that is rotated
_ROTARY_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox")
# transformers 5 renamed GPT-NeoX's head; its own `save_pretrained` still writes the name that every checkpoint has.
_STORED_NAMES = {("gpt_neox", "lm_head.weight"): "embed_out.weight"}
# What transformers 5 writes into a tokenizer_config.json about how the tokenizer was loaded, not about the tokenizer.
LOADING_KEYS = ("backend", "is_local", "local_files_only")
_NOT_SCALING = ("rope_theta", "partial_rotary_factor")  # 4.x keeps these two outside its `rope_scaling`


def with_4x_names(config: dict[str, Any]) -> dict[str, Any]:
    """The same configuration with the names that transformers 4 reads beside those of transformers 5.

    transformers 5 writes the rotary base only as `rope_parameters` and the dtype only as `dtype`. The last 4.x (4.57)
    finds neither `rope_theta` nor (GPT-NeoX) `rotary_emb_base` and `rotary_pct` there and takes its defaults without a
    word, which is another model. What transformers 5 understands decides; the old names repeat it.

    Args:
        config: the content of a config.json, by either generation's names.

    Returns:
        A new dict; `config` itself is left as it was.
    """
    both = dict(config)
    dtype = both.get("dtype") or both.get("torch_dtype")
    if dtype is not None:
        both["dtype"] = both["torch_dtype"] = str(dtype).removeprefix("torch.")
    if both.get("model_type") in _ROTARY_FAMILIES:
        both |= _rotary_names(both)
    return both


def _rotary_names(config: dict[str, Any]) -> dict[str, Any]:
    neox = config["model_type"] == "gpt_neox"
    # transformers 5 reads `rope_scaling`, where there is one, in place of `rope_parameters`.
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    rope.pop("type", None)
    theta_name = "rotary_emb_base" if neox else "rope_theta"  # GPT-NeoX has names of its own in both generations
    for theta in (rope.get("rope_theta"), config.get(theta_name), DEFAULT_ROPE_THETA):
        if theta is not None:
            rope["rope_theta"] = float(theta)
            break
    names: dict[str, Any] = {"rope_theta": rope["rope_theta"]}
    if neox:
        share = rope.setdefault("partial_rotary_factor", config.get("rotary_pct", DEFAULT_ROTARY_SHARE))
        names |= {"rotary_emb_base": rope["rope_theta"], "rotary_pct": share}
    if rope["rope_type"] == "default":
        names["rope_scaling"] = None
    else:
        if rope["rope_type"] in ("llama3", "yarn", "longrope"):  # where transformers 5 fills it in, 4.x asks for it
            rope.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
        names["rope_scaling"] = {name: value for name, value in rope.items() if name not in _NOT_SCALING}
    return names | {"rope_parameters": rope}


def stored_name(family: str, name: str) -> str:
    """What a parameter of a transformers 5 model is called in checkpoint files: by both generations the same.

    Args:
        family: the configuration's `model_type`.
        name: the parameter's name in the model.
    """
    return _STORED_NAMES.get((family, name), name)


def tokenizer_with_4x_names(config: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json that transformers 4 reads too.

    transformers 5 names the class of a plain tokenizer.json `TokenizersBackend`, which the last 4.x does not know, and
    lists further special tokens under a name that 4.x reads as a mapping.

    Args:
        config: the content of a tokenizer_config.json.

    Returns:
        A new dict; both generations load the same tokenizer from it.
    """
    both = {name: value for name, value in config.items() if name not in LOADING_KEYS}
    if both.get("tokenizer_class") == "TokenizersBackend":
        both["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(both.get("extra_special_tokens"), list):
        both["additional_special_tokens"] = both.pop("extra_special_tokens")
    return both
