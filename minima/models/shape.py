"""The shape of a decoder-only model: parameters, FLOPs and bytes from a few integers, without torch."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from minima.errors import ShapeError, UnsupportedFamily
from minima.models.config_file import check_unquantised, read_config

Family = Literal["llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gpt2"]
FAMILIES: tuple[Family, ...] = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gpt2")

# The config.json name of each field: Llama's names, and below them those that other families name differently.
_LLAMA_NAMES = {
    "vocabulary_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "max_positions": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "tied": "tie_word_embeddings",
}
_NEOX_NAMES = _LLAMA_NAMES | {"norm_epsilon": "layer_norm_eps"}
_GPT2_NAMES = _LLAMA_NAMES | {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "max_positions": "n_positions",
    "norm_epsilon": "layer_norm_epsilon",
}
_NAMES: dict[str, dict[str, str]] = {"gpt_neox": _NEOX_NAMES, "gpt2": _GPT2_NAMES}
# transformers 5's defaults for keys that are absent from a config.json; an explicit null is handled differently.
_RMS = {"norm_epsilon": 1e-6, "tied": False}
_ABSENT: dict[str, dict[str, Any]] = {
    "llama": _RMS | {"max_positions": 2048},
    "mistral": _RMS | {"max_positions": 131_072, "num_key_value_heads": 8},
    "qwen2": _RMS | {"max_positions": 32_768, "num_key_value_heads": 32},
    "qwen3": _RMS | {"max_positions": 32_768, "num_key_value_heads": 32, "head_size": 128},
    "gpt_neox": {"norm_epsilon": 1e-5, "max_positions": 2048, "tied": False},
    "gpt2": {"norm_epsilon": 1e-5, "max_positions": 1024, "tied": True},
}


class ModelShape(BaseModel):
    """The facts about a stock model that determine its parameters, FLOPs and bytes.

    Attributes:
        family: the `model_type` of a stock transformers configuration.
        vocabulary_size: rows of the embedding and of the output head.
        hidden_size: width of the residual stream.
        intermediate_size: neurons of one MLP.
        num_layers: decoder layers.
        num_heads: query heads of one layer.
        num_key_value_heads: key-value heads of one layer; `num_heads` if not given (multi-head attention).
        head_size: width of one head; `hidden_size / num_heads` if not given. Must be even where the rotary embedding
            rotates the whole head.
        max_positions: the longest sequence, in tokens, that the model is made for.
        tied: whether the output head is the embedding.
        norm_epsilon: the epsilon of every norm.
        rope_theta: the base of the rotary embedding.
        attention_bias: whether the attention projections of a Llama have biases (fixed in other families).
        mlp_bias: whether the MLP of a Llama has biases.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: Family = "llama"
    vocabulary_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_layers: int = Field(gt=0, le=100_000)  # far above any model; bounded because plans list every layer
    num_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(default=0, ge=0, validate_default=True)
    head_size: int = Field(default=0, ge=0)
    max_positions: int = Field(default=4096, gt=0)
    tied: bool = False
    norm_epsilon: float = Field(default=1e-5, gt=0)
    rope_theta: float = Field(default=10000.0, gt=0)
    attention_bias: bool = False
    mlp_bias: bool = False

    @model_validator(mode="after")
    def _fill_and_check(self) -> Self:
        set_field = object.__setattr__  # the model is frozen; filling in defaults is part of building it
        if not self.num_key_value_heads:
            set_field(self, "num_key_value_heads", self.num_heads)
        if self.num_heads % self.num_key_value_heads:
            raise ShapeError(
                f"{self.num_heads} query heads over {self.num_key_value_heads} key-value heads",
                "every key-value head is shared by the same number of query heads",
                f"choose num_heads as a multiple of {self.num_key_value_heads}",
            )
        if self.family in ("llama", "gpt_neox", "gpt2") and self.hidden_size % self.num_heads:
            raise ShapeError(
                f"hidden_size {self.hidden_size} does not divide into {self.num_heads} heads",
                f"the stock {self.family} configuration refuses such a width, even with an explicit head_size",
                "choose hidden_size as a multiple of num_heads",
            )
        if not self.head_size:
            set_field(self, "head_size", self.hidden_size // self.num_heads)
        # GPT-NeoX rotates a part of each head, rounded up to pairs, and GPT-2 nothing.
        if self.family not in ("gpt_neox", "gpt2") and (self.head_size % 2 or not self.head_size):
            raise ShapeError(
                f"heads of width {self.head_size}",
                f"the rotary embedding of a stock {self.family} rotates the dimensions of a head in pairs",
                "choose an even head_size (if it is not given, it is hidden_size / num_heads)",
            )
        fills_width = self.head_size * self.num_heads == self.hidden_size
        if self.family in ("gpt_neox", "gpt2") and not (fills_width and self.num_key_value_heads == self.num_heads):
            raise ShapeError(
                f"{self.num_heads} heads of {self.head_size} ({self.num_key_value_heads} key-value heads) "
                f"at width {self.hidden_size}",
                f"a stock {self.family} has multi-head attention whose heads fill the width exactly",
                "choose num_heads x head_size = hidden_size and omit num_key_value_heads",
            )
        return self

    # -- parameters ---------------------------------------------------------------------------------------------

    @property
    def attention_parameters(self) -> int:
        """Parameters of one layer's attention, biases and query-key norms included."""
        query, key_value = self.num_heads * self.head_size, self.num_key_value_heads * self.head_size
        matrices = 2 * self.hidden_size * query + 2 * self.hidden_size * key_value
        if self.family in ("gpt_neox", "gpt2"):
            return matrices + query + 2 * key_value + self.hidden_size
        if self.family == "qwen2":
            return matrices + query + 2 * key_value
        if self.family == "qwen3":
            matrices += 2 * self.head_size
        if self.attention_bias and self.family in ("llama", "qwen3"):
            return matrices + query + 2 * key_value + self.hidden_size
        return matrices

    @property
    def mlp_parameters(self) -> int:
        """Parameters of one layer's MLP."""
        if self.family in ("gpt_neox", "gpt2"):
            return 2 * self.hidden_size * self.intermediate_size + self.intermediate_size + self.hidden_size
        biases = 2 * self.intermediate_size + self.hidden_size if self.mlp_bias and self.family == "llama" else 0
        return 3 * self.hidden_size * self.intermediate_size + biases

    @property
    def norm_parameters(self) -> int:
        """Parameters of one norm over the width: a LayerNorm has a bias, an RMSNorm has none."""
        return (2 if self.family in ("gpt_neox", "gpt2") else 1) * self.hidden_size

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer."""
        return self.attention_parameters + self.mlp_parameters + 2 * self.norm_parameters

    @property
    def embedding_parameters(self) -> int:
        """Parameters of token (and learned position) embeddings and of an untied head."""
        positions = self.max_positions * self.hidden_size if self.family == "gpt2" else 0
        return (1 if self.tied else 2) * self.vocabulary_size * self.hidden_size + positions

    @property
    def non_embedding_parameters(self) -> int:
        """Parameters of the layers and the final norm."""
        return self.num_layers * self.layer_parameters + self.norm_parameters

    @property
    def parameters(self) -> int:
        """All parameters; a tied head counts once."""
        return self.embedding_parameters + self.non_embedding_parameters

    # -- arithmetic ---------------------------------------------------------------------------------------------

    def forward_flops_per_token(self, sequence_length: int) -> float:
        """FLOPs of one forward pass per token: two per weight of each matrix product, attention included.

        Attention counts scores and values over half of the sequence, the mean length of a causal context.
        """
        matrices = self.num_layers * (self.attention_parameters + self.mlp_parameters)
        head = self.vocabulary_size * self.hidden_size
        attention = self.num_layers * self.num_heads * self.head_size * sequence_length
        return 2.0 * (matrices + head) + 2.0 * attention

    def training_flops_per_token(self, sequence_length: int) -> float:
        """FLOPs of forward and backward pass per token; the backward pass costs as much as two forward passes."""
        return 3.0 * self.forward_flops_per_token(sequence_length)

    # -- stock configurations -----------------------------------------------------------------------------------

    def to_config(self) -> dict[str, Any]:
        """The fields of a stock `config.json` that has this shape (without dtype and token ids)."""
        names = _NAMES.get(self.family, _LLAMA_NAMES)
        config: dict[str, Any] = {"model_type": self.family}
        skip = {"gpt_neox": {"num_key_value_heads", "head_size", "attention_bias"}, "qwen2": {"attention_bias"}}
        skip["gpt2"] = skip["gpt_neox"] | {"rope_theta"}
        skip["mistral"] = {"attention_bias"}
        for field, name in names.items():
            if field not in skip.get(self.family, set()):
                config[name] = getattr(self, field)
        if not (self.mlp_bias and self.family == "llama"):
            config.pop("mlp_bias")
        if self.family == "qwen2" and self.head_size * self.num_heads == self.hidden_size:
            config.pop("head_dim")  # not a field of its configuration class, though its attention reads it
        if self.family == "gpt_neox":  # its configuration reads the base from here only
            config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
        if self.family in ("gpt_neox", "gpt2"):  # modern pre-training of both uses no dropout, unlike GPT-2's defaults
            dropouts = {"gpt2": ("attn_pdrop", "embd_pdrop", "resid_pdrop")}
            config |= dict.fromkeys(dropouts.get(self.family, ("attention_dropout", "hidden_dropout")), 0.0)
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ModelShape":
        """The shape that a stock `config.json` describes.

        Raises:
            UnsupportedFamily: the `model_type` is not supported.
            ShapeError: fields are missing, or the shape is impossible.
            CheckpointError: the weights are quantised.
        """
        family = config.get("model_type")
        if family not in FAMILIES:
            raise UnsupportedFamily(
                f"model_type {family!r}",
                "it is not known which of its tensors are heads, neurons and norms, so it cannot be sized or pruned",
                f"use one of {', '.join(FAMILIES)}",
            )
        check_unquantised(config)
        names = _NAMES.get(family, _LLAMA_NAMES)
        values = {field: value for field, value in _ABSENT[family].items() if names[field] not in config}
        values |= {field: config[name] for field, name in names.items() if config.get(name) is not None}
        if family == "gpt2" and isinstance(values.get("hidden_size"), int):
            values.setdefault("intermediate_size", 4 * values["hidden_size"])
        rope = config.get("rope_parameters") or {}
        base = rope.get("rope_theta", config.get("rotary_emb_base")) if isinstance(rope, dict) else "none"
        if base is not None:
            values["rope_theta"] = base
        if family in ("gpt_neox", "gpt2"):
            for field in ("num_key_value_heads", "head_size", "attention_bias"):
                values.pop(field, None)
        try:
            return cls(family=family, **values)
        except ValidationError as error:
            for problem in error.errors():
                cause = problem.get("ctx", {}).get("error")
                if isinstance(cause, ShapeError):
                    raise cause from None
            fields = [str(problem["loc"][0]) for problem in error.errors() if problem["loc"]]
            wrong = ", ".join(names.get(field, field) for field in fields) or "something"
            raise ShapeError(
                f"a config.json of model_type {family!r} in which {wrong} is missing or impossible",
                "the model's shape cannot be determined",
                "download or write the model's folder again",
            ) from None

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelShape":
        """The shape given by `folder/config.json`.

        Raises:
            CheckpointError: there is no readable config.json.
            ShapeError: it does not describe a valid model.
        """
        return cls.from_config(read_config(folder))
