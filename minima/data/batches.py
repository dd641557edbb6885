"""Blocks of a store as a batch, with its document boundaries and trainable tokens if the store defines them."""

import numpy as np
import torch

from minima.batch import Batch, make_batch
from minima.data.store import TokenStore


def read_batch(
    store: TokenStore,
    blocks: np.ndarray,
    valid: np.ndarray | None = None,
    *,
    samples: tuple[int, ...] = (),
    sequence_length: int | None = None,
) -> Batch:
    """Read some blocks as one micro-batch on the CPU.

    Args:
        store: holds the blocks.
        blocks: block numbers, int array [B].
        valid: bool array [B]; False for a block whose tokens all get no label. All True if not given.
        samples: the run's number of each sequence; see `Batch`.
        sequence_length: use only this many tokens from the start of each block; all if not given.
    """
    length = sequence_length or store.sequence_length
    tokens_BT = torch.from_numpy(store.blocks(blocks))[:, :length].contiguous()
    valid_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
    if (learnt := store.learnt(blocks)) is not None:
        valid_BT &= torch.from_numpy(learnt)[:, :length]
    if valid is not None:
        valid_BT &= torch.from_numpy(np.asarray(valid, dtype=bool)).unsqueeze(1)
    documents_BT, num_documents = None, 0
    if store.document_mask:
        documents_BT = torch.from_numpy(store.documents(blocks))[:, :length].contiguous()
        num_documents = int(documents_BT.max()) + 1
        if num_documents == 1 and store.format != "preferences":  # plain causal attention is the same, and faster
            documents_BT = None
    batch = make_batch(tokens_BT, valid_BT, documents_BT)
    if batch.positions_BT is not None:  # padding may be longer than any document, and than the model's positions
        batch = batch._replace(positions_BT=batch.positions_BT.clamp_max(store.longest - 1))
    numbers = tuple(int(block) for block in blocks)
    return batch._replace(num_documents=num_documents, samples=samples, blocks=numbers)
