"""NEFTune: noise on the embeddings during instruction tuning (Jain et al., 2023, arXiv 2310.05914).

Shapes: B sequences, T tokens, D width.
"""

import hashlib

import torch
from torch import Tensor
from transformers import PreTrainedModel

from minima.batch import Batch


def noisy_embeddings(model: PreTrainedModel, batch: Batch, alpha: float, seed: int) -> Tensor:
    """The tokens' embeddings with uniform noise in +-alpha / sqrt(L D), L being the tokens of each token's document.

    The noise depends only on the seed and on each sequence's number in the run: it is the same on any number of ranks,
    in any micro-batch, and after a resumption. Runs inside the student's forward.

    Args:
        model: provides the embedding.
        batch: `samples` holds its sequences' numbers.
        alpha: 5 to 15 in the paper.
        seed: the run's seed.

    Returns:
        [B, T, D] in the embedding's dtype.
    """
    assert len(batch.samples) == len(batch.input_ids_BT), "the noise is seeded by the sequences' numbers"
    embeddings_BTD = model.get_input_embeddings()(batch.input_ids_BT)
    noise_BTD = torch.empty(embeddings_BTD.shape, dtype=torch.float32, device=embeddings_BTD.device)
    for noise_TD, sample in zip(noise_BTD, batch.samples, strict=True):
        digest = hashlib.sha256(f"neftune:{seed}:{sample}".encode()).digest()
        generator = torch.Generator(device=noise_TD.device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        noise_TD.uniform_(-1.0, 1.0, generator=generator)
    scale_BT1 = alpha / (document_lengths(batch) * embeddings_BTD.shape[-1]).sqrt().unsqueeze(-1)
    return embeddings_BTD + (noise_BTD * scale_BT1).to(embeddings_BTD.dtype)


def document_lengths(batch: Batch) -> Tensor:
    """For each token, the number of tokens in its document; float32 [B, T]."""
    shape = batch.input_ids_BT.shape
    if batch.documents_BT is None:
        return torch.full(shape, float(shape[1]), device=batch.input_ids_BT.device)
    counts_BS = torch.zeros(shape[0], shape[1], device=batch.input_ids_BT.device)
    counts_BS.scatter_add_(1, batch.documents_BT, torch.ones(shape, device=counts_BS.device))
    return counts_BS.gather(1, batch.documents_BT)
