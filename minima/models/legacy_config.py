"""Configurations that transformers 5 and 4 read alike: the field names of 5.x plus those of the last 4.x. No torch."""

from typing import Any

DEFAULT_ROPE_THETA = 10000.0  # `PreTrainedConfig.default_theta` of transformers 5, for every rotary family below
DEFAULT_ROTARY_SHARE = 0.25  # GPTNeoXConfig: the share of a head that is rotated
_ROTARY_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox")
# transformers 5 renamed GPT-NeoX's head; its own `save_pretrained` still writes the old name, as every checkpoint has.
_STORED_NAMES = {("gpt_neox", "lm_head.weight"): "embed_out.weight"}
# What transformers 5 writes into a tokenizer_config.json about how the tokenizer was loaded, not about the tokenizer.
LOADING_KEYS = ("backend", "is_local", "local_files_only")
# Names code outside the folder. What minima writes needs none, and whoever trusts it must not execute another's.
CODE_KEY = "auto_map"
_NOT_SCALING = ("rope_theta", "partial_rotary_factor")  # 4.x keeps these two outside its `rope_scaling`


def with_4x_names(config: dict[str, Any]) -> dict[str, Any]:
    """Add the names that transformers 4 reads to a configuration with those of transformers 5.

    transformers 5 writes the rotary base only as `rope_parameters` and the dtype only as `dtype`. The last 4.x (4.57)
    finds neither `rope_theta` nor (GPT-NeoX) `rotary_emb_base` and `rotary_pct` there and silently uses its defaults,
    which gives a different model. If the names disagree, transformers 5's reading wins; the old names repeat it.

    Args:
        config: the content of a config.json, with either version's names.

    Returns:
        A new dict, without the names of a model's own code; `config` itself is not changed.
    """
    both = {name: value for name, value in config.items() if name != CODE_KEY}
    dtype = both.get("dtype") or both.get("torch_dtype")
    if dtype is not None:
        both["dtype"] = both["torch_dtype"] = str(dtype).removeprefix("torch.")
    if both.get("model_type") in _ROTARY_FAMILIES:
        both |= _rotary_names(both)
    return both


def _rotary_names(config: dict[str, Any]) -> dict[str, Any]:
    neox = config["model_type"] == "gpt_neox"
    # If there is a `rope_scaling`, transformers 5 reads it in place of `rope_parameters`.
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    rope.pop("type", None)
    theta_name = "rotary_emb_base" if neox else "rope_theta"  # GPT-NeoX has its own names in both versions
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
        if rope["rope_type"] in ("llama3", "yarn", "longrope"):  # transformers 5 fills it in, 4.x requires it
            rope.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
        names["rope_scaling"] = {name: value for name, value in rope.items() if name not in _NOT_SCALING}
    return names | {"rope_parameters": rope}


def stored_name(family: str, name: str) -> str:
    """The name of a transformers 5 model's parameter in checkpoint files, which is the same for both versions.

    Args:
        family: the configuration's `model_type`.
        name: the parameter's name in the model.
    """
    return _STORED_NAMES.get((family, name), name)


def tokenizer_with_4x_names(config: dict[str, Any]) -> dict[str, Any]:
    """Convert a tokenizer_config.json so that transformers 4 can read it too.

    transformers 5 calls the class of a plain tokenizer.json `TokenizersBackend`, which the last 4.x does not know, and
    lists further special tokens under a name that 4.x reads as a mapping.

    Args:
        config: the content of a tokenizer_config.json.

    Returns:
        A new dict; both versions load the same tokenizer from it, without its own code.
    """
    both = {name: value for name, value in config.items() if name not in (*LOADING_KEYS, CODE_KEY)}
    if both.get("tokenizer_class") == "TokenizersBackend":
        both["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(both.get("extra_special_tokens"), list):
        both["additional_special_tokens"] = both.pop("extra_special_tokens")
    return both
