"""Where each family keeps heads, neurons, norms and width; the only place that knows. No torch."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from minima.errors import UnsupportedFamily
from minima.models.shape import FAMILIES, ModelShape


class Part(Enum):
    """What one axis of a tensor indexes."""

    HIDDEN = "hidden"  # the residual stream
    QUERY = "query"  # query heads, head by head
    KEY_VALUE = "key_value"  # key-value heads, head by head
    INTERLEAVED = "interleaved"  # the query, key and value rows of each head in turn (GPT-NeoX)
    BLOCKS = "blocks"  # all queries, then all keys, then all values (GPT-2)
    NEURON = "neuron"  # the MLP's inner width


Axes = tuple[Part | None, ...]  # one entry per axis; None for an axis that is never pruned
H, Q, K, N = Part.HIDDEN, Part.QUERY, Part.KEY_VALUE, Part.NEURON


@dataclass(frozen=True)
class Family:
    """One family's stock modules and tensors, by name."""

    name: str  # the `model_type`
    layers: str  # path of the list of decoder layers
    embeddings: tuple[str, ...]  # paths of the modules whose outputs sum to the first hidden states
    final_norm: str  # path of the norm after the last layer
    attention_output: str  # inside a layer, the linear module that takes all heads
    mlp_output: str  # inside a layer, the linear module that takes all neurons
    norms: tuple[str, ...]  # inside a layer, the norms over the width
    rms: bool  # whether those norms are RMSNorms (no mean, no bias)
    query_key_norms: bool  # whether queries and keys are normalised head by head, with the model's norm epsilon
    # the config's names for layers, width, query heads, neurons and norm epsilon, and, if it has them, for key-value
    # heads and head size
    config_names: dict[str, str]
    outer: dict[str, Axes]  # axes of the tensors outside the layers
    inner: dict[str, Axes]  # axes of the tensors of one layer

    def locate(self, name: str) -> tuple[int | None, str, Axes]:
        """The layer of a tensor (None outside the layers), its name within the layer, and what its axes index.

        Raises:
            UnsupportedFamily: stock models of this family have no such tensor.
        """
        layer: int | None = None
        inside, table = name, self.outer
        if name.startswith(self.layers + "."):
            number, inside = name.removeprefix(self.layers + ".").split(".", 1)
            layer, table = int(number), self.inner
        if inside not in table:
            raise UnsupportedFamily(
                f"tensor {name!r} in a {self.name} model",
                "it is not known which of its axes are heads, neurons or width, so it cannot be pruned",
                "use a stock checkpoint of the family, without adapters or extra modules",
            )
        return layer, inside, table[inside]


_LLAMA_LIKE = Family(
    name="llama",
    layers="model.layers",
    embeddings=("model.embed_tokens",),
    final_norm="model.norm",
    attention_output="self_attn.o_proj",
    mlp_output="mlp.down_proj",
    norms=("input_layernorm", "post_attention_layernorm"),
    rms=True,
    query_key_norms=False,
    config_names={
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "num_heads": "num_attention_heads",
        "num_key_value_heads": "num_key_value_heads",
        "head_size": "head_dim",
        "intermediate_size": "intermediate_size",
        "norm_epsilon": "rms_norm_eps",
    },
    outer={"model.embed_tokens.weight": (None, H), "model.norm.weight": (H,), "lm_head.weight": (None, H)},
    inner={
        "input_layernorm.weight": (H,),
        "post_attention_layernorm.weight": (H,),
        "self_attn.q_proj.weight": (Q, H),
        "self_attn.q_proj.bias": (Q,),
        "self_attn.k_proj.weight": (K, H),
        "self_attn.k_proj.bias": (K,),
        "self_attn.v_proj.weight": (K, H),
        "self_attn.v_proj.bias": (K,),
        "self_attn.o_proj.weight": (H, Q),
        "self_attn.o_proj.bias": (H,),
        "self_attn.q_norm.weight": (None,),
        "self_attn.k_norm.weight": (None,),
        "mlp.gate_proj.weight": (N, H),
        "mlp.gate_proj.bias": (N,),
        "mlp.up_proj.weight": (N, H),
        "mlp.up_proj.bias": (N,),
        "mlp.down_proj.weight": (H, N),
        "mlp.down_proj.bias": (H,),
    },
)

_GPT_NEOX = Family(
    name="gpt_neox",
    layers="gpt_neox.layers",
    embeddings=("gpt_neox.embed_in",),
    final_norm="gpt_neox.final_layer_norm",
    attention_output="attention.dense",
    mlp_output="mlp.dense_4h_to_h",
    norms=("input_layernorm", "post_attention_layernorm"),
    rms=False,
    query_key_norms=False,
    config_names={
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "num_heads": "num_attention_heads",
        "intermediate_size": "intermediate_size",
        "norm_epsilon": "layer_norm_eps",
    },
    outer={
        "gpt_neox.embed_in.weight": (None, H),
        "gpt_neox.final_layer_norm.weight": (H,),
        "gpt_neox.final_layer_norm.bias": (H,),
        "lm_head.weight": (None, H),
    },
    inner={
        "input_layernorm.weight": (H,),
        "input_layernorm.bias": (H,),
        "post_attention_layernorm.weight": (H,),
        "post_attention_layernorm.bias": (H,),
        "attention.query_key_value.weight": (Part.INTERLEAVED, H),
        "attention.query_key_value.bias": (Part.INTERLEAVED,),
        "attention.dense.weight": (H, Q),
        "attention.dense.bias": (H,),
        "mlp.dense_h_to_4h.weight": (N, H),
        "mlp.dense_h_to_4h.bias": (N,),
        "mlp.dense_4h_to_h.weight": (H, N),
        "mlp.dense_4h_to_h.bias": (H,),
    },
)

# GPT-2's Conv1D stores its matrix as [in, out].
_GPT2 = Family(
    name="gpt2",
    layers="transformer.h",
    embeddings=("transformer.wte", "transformer.wpe"),
    final_norm="transformer.ln_f",
    attention_output="attn.c_proj",
    mlp_output="mlp.c_proj",
    norms=("ln_1", "ln_2"),
    rms=False,
    query_key_norms=False,
    config_names={
        "num_layers": "n_layer",
        "hidden_size": "n_embd",
        "num_heads": "n_head",
        "intermediate_size": "n_inner",
        "norm_epsilon": "layer_norm_epsilon",
    },
    outer={
        "transformer.wte.weight": (None, H),
        "transformer.wpe.weight": (None, H),
        "transformer.ln_f.weight": (H,),
        "transformer.ln_f.bias": (H,),
        "lm_head.weight": (None, H),
    },
    inner={
        "ln_1.weight": (H,),
        "ln_1.bias": (H,),
        "ln_2.weight": (H,),
        "ln_2.bias": (H,),
        "attn.c_attn.weight": (H, Part.BLOCKS),
        "attn.c_attn.bias": (Part.BLOCKS,),
        "attn.c_proj.weight": (Q, H),
        "attn.c_proj.bias": (H,),
        "mlp.c_fc.weight": (H, N),
        "mlp.c_fc.bias": (N,),
        "mlp.c_proj.weight": (N, H),
        "mlp.c_proj.bias": (H,),
    },
)


def _llama_like(name: str, **changes: Any) -> Family:
    return Family(**(_LLAMA_LIKE.__dict__ | {"name": name} | changes))


_FAMILIES: dict[str, Family] = {
    "llama": _LLAMA_LIKE,
    "mistral": _llama_like("mistral"),
    "qwen2": _llama_like("qwen2"),
    "qwen3": _llama_like("qwen3", query_key_norms=True),
    "gpt_neox": _GPT_NEOX,
    "gpt2": _GPT2,
}
assert set(_FAMILIES) == set(FAMILIES)


def family_of(model_type: str | None) -> Family:
    """The family of a `model_type`.

    Raises:
        UnsupportedFamily: it is not a supported family.
    """
    if model_type not in _FAMILIES:
        raise UnsupportedFamily(
            f"model_type {model_type!r}",
            "it is not known which of its tensors are heads, neurons and norms, so it cannot be pruned",
            f"use one of {', '.join(FAMILIES)}",
        )
    return _FAMILIES[model_type]


def layout(part: Part, shape: ModelShape) -> tuple[int, int, int]:
    """How an axis is reshaped into (outer, units, inner), so that element `(o, u, i)` belongs to unit `u`.

    Units are hidden dimensions, neurons, or key-value groups (a key-value head with the query heads that share it).
    """
    queries_per_group = shape.num_heads // shape.num_key_value_heads
    return {
        Part.HIDDEN: (1, shape.hidden_size, 1),
        Part.NEURON: (1, shape.intermediate_size, 1),
        Part.QUERY: (1, shape.num_key_value_heads, queries_per_group * shape.head_size),
        Part.KEY_VALUE: (1, shape.num_key_value_heads, shape.head_size),
        Part.INTERLEAVED: (1, shape.num_key_value_heads, 3 * shape.head_size),
        Part.BLOCKS: (3, shape.num_key_value_heads, shape.head_size),
    }[part]


def shape_of(config: dict[str, Any]) -> ModelShape:
    """The shape given by a stock `config.json`, provided that every part of the model can be pruned.

    Raises:
        UnsupportedFamily: the family is unknown, or it is a variant with unsupported parts.
    """
    family_of(config.get("model_type"))
    if config.get("add_cross_attention"):
        raise UnsupportedFamily(
            "a GPT-2 with cross-attention",
            "the encoder side is not supported, so it cannot be pruned with the rest",
            "use a decoder-only GPT-2",
        )
    return ModelShape.from_config(config)
