"""Whether two ways to load a model give the same predictions.

Shapes: B sequences, T tokens, N = B x T, V vocabulary, D width.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minima.batch import Batch, make_batch
from minima.errors import CheckpointError
from minima.evaluation.held_out import Host
from minima.models.causal_lm import load_folder

PROBE_SEQUENCES, PROBE_TOKENS = 2, 64  # long enough to reveal a wrong rotary base; 25 MB of logits at 49,152 tokens
# Largest difference, relative to the largest logit. Equal weights in the same code give equal bits; a different order
# of float32 sums differs by about 1e-6, and a wrong rotary base by at least 1e-3, on random weights.
TOLERANCE = 1e-4
_PROBE_SEED = 776


def probe_batch(config: dict[str, Any]) -> Batch:
    """A batch of random token ids, the same on every rank; random ids exercise every part of a model.

    Args:
        config: content of the model's config.json.
    """
    longest = config.get("max_position_embeddings") or config.get("n_positions") or PROBE_TOKENS
    generator = torch.Generator().manual_seed(_PROBE_SEED)
    shape = (PROBE_SEQUENCES, min(PROBE_TOKENS, longest))
    return make_batch(torch.randint(config["vocab_size"], shape, generator=generator))


def host_logits(host: Host, batch: Batch) -> Tensor:
    """Logits [N, V] of a sharded model, float32 on the CPU; every rank calls it."""
    with torch.no_grad():
        hidden_ND = host.hidden_states(batch.to(host.device)).flatten(0, 1)
        return (hidden_ND.float() @ host.head_VE.float().t()).cpu()


def plain_logits(folder: Path, batch: Batch, dtype: torch.dtype) -> Tensor:
    """Logits [N, V] of a model folder loaded by plain transformers in one process; float32 on the CPU."""
    model = load_folder(folder, dtype)
    with torch.no_grad():
        return model(input_ids=batch.input_ids_BT, use_cache=False).logits.flatten(0, 1).float()


def check_same_logits(expected_NV: Tensor, found_NV: Tensor, what: str) -> float:
    """Compare two models' logits and return the largest difference.

    Args:
        expected_NV: of the trained model.
        found_NV: of the model that was written.
        what: how the second was loaded, for the error.

    Raises:
        CheckpointError: they differ by more than rounding.
    """
    difference = (expected_NV - found_NV).abs().max().item()
    allowed = TOLERANCE * expected_NV.abs().max().item()
    if not difference <= allowed:  # also true for NaN
        raise CheckpointError(
            f"logits of the written folder, loaded by {what}, differ from the trained model's by {difference:.3g} "
            f"(rounding explains {allowed:.3g})",
            "the folder holds the right tensors but describes a different model, so it is not published",
            "compare its config.json with the trained model's; this is a bug in minima, please report it",
        )
    return difference
