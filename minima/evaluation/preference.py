"""Held-out preference loss of one model over every block exactly once.

Shapes: B sequences, T tokens, D width, V vocabulary.
"""

from dataclasses import asdict, dataclass

import torch

from minima.data.store import TokenStore
from minima.engine import distributed
from minima.engine.objectives.preference import Preference
from minima.errors import DataError
from minima.evaluation.held_out import Host, check_finite, check_store, held_out_batch, rank_blocks


@dataclass(frozen=True)
class HeldOutPreference:
    """A model's mean scores on held-out pairs."""

    loss: float  # of the training objective
    accuracy: float  # share of pairs whose chosen answer has the higher reward; 0 if the model equals its reference
    margin: float  # reward of the chosen answer minus that of the rejected one
    chosen_reward: float  # beta times the log-ratio of model to reference for the chosen answer
    rejected_reward: float  # the same for the rejected answer
    pairs: int

    def as_dict(self) -> dict[str, float]:
        """The scores by name."""
        return asdict(self)


def evaluate_preference(
    host: Host,
    store: TokenStore,
    objective: Preference,
    *,
    sequences: int | None = None,
    micro_batch_sequences: int = 4,
    name: str = "model",
) -> HeldOutPreference:
    """Score a model on the pairs of the first `sequences` blocks; every rank calls it and gets the same result.

    Apart from the order of float32 sums, the result depends neither on the number of ranks nor on the micro-batch.

    Args:
        store: held-out blocks of preferences.
        objective: the loss, with a reference for this store.
        sequences: at most this many blocks; all if not given.
        micro_batch_sequences: blocks per forward pass on one rank.

    Raises:
        DataError: the store is empty, or holds no pair.
        TokenizerMismatch: the store has token ids that the model does not know.
        NotFinite: the loss is infinite or NaN.
    """
    num_blocks = len(store) if sequences is None else min(sequences, len(store))
    check_store(host, store, num_blocks, name)
    names = ("accuracy", "margin", "chosen_reward", "rejected_reward")
    sums = torch.zeros(len(names) + 2, dtype=torch.float64, device=host.device)
    with torch.no_grad():
        for blocks in rank_blocks(num_blocks, micro_batch_sequences, distributed.rank(), distributed.world_size()):
            [batch] = objective.prepare([held_out_batch(store, blocks, micro_batch_sequences).to(host.device)])
            loss = objective.loss_sum(host.hidden_states(batch), host.head_VE, batch)
            values = [loss.total, *(loss.parts[part] for part in names), loss.count]
            sums += torch.stack([value.double() for value in values])
    loss_sum, accuracy, margin, chosen, rejected, pairs = distributed.all_reduce_sum(sums).tolist()
    if not pairs:
        raise DataError(
            f"{store.folder} holds no preference pair",
            "there are no pairs to compute a loss over",
            "raise held_out_fraction of the build_data stage, or check what that stage rejected",
        )
    mean = loss_sum / pairs
    check_finite(mean, f"{name} has a held-out preference loss")
    return HeldOutPreference(
        loss=mean,
        accuracy=accuracy / pairs,
        margin=margin / pairs,
        chosen_reward=chosen / pairs,
        rejected_reward=rejected / pairs,
        pairs=round(pairs),
    )
