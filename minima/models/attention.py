"""Causal attention that asks nothing of the host."""

from transformers import AttentionInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# The stock `sdpa` looks, in every forward pass, whether position ids describe a packed batch, and reads the answer on
# the host: on a GPU each micro-batch would wait for it twice, for teacher and student. Under a name of its own, for
# which no mask is made, the same kernel runs with `is_causal`, to the same bits. A new entry; no stock one is changed.
CAUSAL = "minima_causal"
AttentionInterface.register(CAUSAL, sdpa_attention_forward)


def attention_implementation(config: PretrainedConfig) -> str:
    """The attention of a stock model: plain causal, or `sdpa` where a sliding window needs a mask."""
    return CAUSAL if getattr(config, "sliding_window", None) is None else "sdpa"
