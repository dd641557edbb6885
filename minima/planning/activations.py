"""Bytes of activations: what a layer's forward pass keeps for its backward pass, and what is only temporary.

What autograd saves was measured on stock models of transformers 5.23 with `saved_tensors_hooks`, and
`tests/unit/planning/test_activations.py` compares the sums below with them, family by family. They hold for PyTorch's
operators with attention through SDPA; fused kernels (`kernels: liger`) and compiled layers save less.

`precision` is `float32` or `bfloat16`, of weights and activations; `checkpointing` is `none`, `selective` or `full`.
"""

from minima.models.shape import ModelShape
from minima.planning.sharding import BYTES


def _norm(width: int, size: int) -> int:
    """Bytes that an RMSNorm keeps per token: its float32 input, its scaled input, and the reciprocal root."""
    return width * (4 + size) + 4


def layer_saved_bytes(shape: ModelShape, precision: str, checkpointing: str) -> int:
    """Bytes per token that one layer keeps for the backward pass.

    Args:
        checkpointing: `none`; `selective`, the layer's input and the outputs of matrix products and attention; `full`,
            the input.
    """
    size = BYTES[precision]
    width, neurons = shape.hidden_size, shape.intermediate_size
    query, key_value = shape.num_heads * shape.head_size, shape.num_key_value_heads * shape.head_size
    scores = 4 * shape.num_heads  # log-sum-exp of each head, in float32
    gated = shape.family not in ("gpt_neox", "gpt2")
    if checkpointing == "full":
        return size * width
    if checkpointing == "selective":
        products = 2 * query + 2 * key_value + width + (2 if gated else 1) * neurons + width
        return size * (width + products) + scores
    if not gated:
        inputs = 1 if shape.family == "gpt_neox" else 2  # both norms of a parallel layer read the same tensor
        norms = size * (inputs + 2) * width + 2 * 2 * size
        attention = size * (4 * width if shape.family == "gpt2" else 7 * width) + scores
        return norms + attention + size * neurons * (5 if shape.family == "gpt2" else 2)
    norms = 2 * (_norm(width, size) + size * width)
    if shape.family == "qwen3":
        norms += (4 + size) * (query + key_value) + 4 * (shape.num_heads + shape.num_key_value_heads)
    return norms + size * (2 * query + 2 * key_value) + scores + size * 4 * neurons


def saved_bytes(shape: ModelShape, precision: str, checkpointing: str, tokens: int, sequence_length: int) -> int:
    """Bytes that the whole model keeps for the backward pass of one micro-batch, without the final hidden states.

    Args:
        tokens: tokens in the micro-batch.
        sequence_length: tokens per sequence.
    """
    size, width = BYTES[precision], shape.hidden_size
    layers = shape.num_layers * layer_saved_bytes(shape, precision, checkpointing)
    gated = shape.family not in ("gpt_neox", "gpt2")
    final = 8 + (_norm(width, size) if gated else size * (width + 2))  # 8 for the token's id
    rotary = 2 * size * shape.head_size * sequence_length if shape.family != "gpt2" else 0
    return tokens * (layers + final) + rotary


def recomputed_bytes(shape: ModelShape, precision: str, checkpointing: str, tokens: int) -> int:
    """Temporary bytes while one layer's backward pass runs: what it recomputes, and its gradients."""
    size, width = BYTES[precision], shape.hidden_size
    query = shape.num_heads * shape.head_size
    again = layer_saved_bytes(shape, precision, "none") - layer_saved_bytes(shape, precision, checkpointing)
    # Gradients of a layer's output and of its widest part: of both factors and of their product.
    gradients = size * (2 * width + max(3 * shape.intermediate_size, 4 * query))
    return tokens * (max(0, again) + gradients)


def forward_bytes(shape: ModelShape, precision: str, tokens: int, ranks: int = 1) -> int:
    """Temporary bytes while one layer runs without gradients, its input not counted. The final norm takes less.

    Args:
        tokens: tokens that run together.
        ranks: number of ranks that each matrix is split over.
    """
    size, width, neurons = BYTES[precision], shape.hidden_size, shape.intermediate_size // ranks
    query = shape.num_heads * shape.head_size // ranks
    key_value = shape.num_key_value_heads * shape.head_size // ranks
    norm = 8 * width  # the float32 copy and its product
    attention = size * (2 * width + 3 * query + 3 * key_value)  # queries and keys before and after their rotation
    mlp = size * (2 * width + 3 * neurons)
    return tokens * max(norm + size * width, attention, mlp)
