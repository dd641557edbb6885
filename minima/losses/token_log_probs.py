"""Per-token log-probabilities from hidden states; logits are materialised for one chunk of tokens at a time.

Shapes: N tokens, C tokens of one chunk, R rows of one block of a chunk, D width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from minima.batch import IGNORE_INDEX
from minima.losses.checks import check_chunk, check_tokens
from minima.losses.linear import add_gradients, first_order, float_logits, logits_head, row_blocks, without_autocast


def linear_token_log_probs(hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, *, chunk_tokens: int = 1024) -> Tensor:
    """log p(label) of every token; the logits of all tokens never exist at once.

    The weight of each token is known only once a loss has been computed from the result, so the backward pass computes
    every chunk's logits a second time; only one number per token is stored between the passes.

    Args:
        hidden_ND: final hidden states, differentiable, any float dtype; logits and softmax are float32.
        head_VD: output head, differentiable.
        labels_N: int64 next tokens; `IGNORE_INDEX` for tokens to skip.
        chunk_tokens: number of tokens whose logits exist at one time.

    Returns:
        float32 [N] in nats; 0, with no gradient, where the label is `IGNORE_INDEX`.

    Raises:
        MinimaError: the numbers of tokens or the widths do not match, or `chunk_tokens` is below 1.
    """
    check_tokens(labels_N, model=(hidden_ND, head_VD))
    check_chunk(chunk_tokens)
    return _TokenLogProbs.apply(hidden_ND, head_VD, labels_N, chunk_tokens)


class _TokenLogProbs(torch.autograd.Function):
    """Log-probabilities and their gradients with respect to hidden states and head, computed chunk by chunk."""

    @staticmethod
    @without_autocast
    def forward(ctx: Any, hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, chunk_tokens: int) -> Tensor:
        keep_N = labels_N != IGNORE_INDEX
        labels_N = labels_N.masked_fill(~keep_N, 0)
        log_probs_N = torch.empty(labels_N.shape, dtype=torch.float32, device=hidden_ND.device)
        log_total_N = torch.empty_like(log_probs_N)  # log of the sum over the vocabulary
        float_VD = logits_head(head_VD, hidden_ND.dtype)
        for start in range(0, labels_N.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            logits_CV = float_logits(hidden_ND[chunk], float_VD)
            for block in row_blocks(logits_CV):
                log_total_N[chunk][block] = logits_CV[block].logsumexp(-1)
            log_probs_N[chunk] = logits_CV.gather(1, labels_N[chunk].unsqueeze(1)).squeeze(1)
            del logits_CV
        log_probs_N.sub_(log_total_N).masked_fill_(~keep_N, 0.0)
        # ZeRO-3 partitions the head's parameter again when the root's forward ends. This view keeps the gathered weight
        # alive until this node, the first of the backward pass, has used it.
        ctx.save_for_backward(hidden_ND, head_VD.detach(), labels_N, keep_N, log_total_N)
        ctx.chunk_tokens = chunk_tokens
        return log_probs_N

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, head_VD, labels_N, keep_N, log_total_N = ctx.saved_tensors
        need_hidden, need_head = ctx.needs_input_grad[:2]
        grad_hidden_ND = torch.zeros_like(hidden_ND) if need_hidden else None
        grad_head_VD = torch.zeros_like(head_VD, dtype=torch.float32) if need_head else None
        float_VD = logits_head(head_VD, hidden_ND.dtype)
        for start in range(0, labels_N.shape[0], ctx.chunk_tokens):
            chunk = slice(start, start + ctx.chunk_tokens)
            hidden_CD = hidden_ND[chunk]
            logits_CV = float_logits(hidden_CD, float_VD)
            _overwrite(logits_CV, labels_N[chunk], keep_N[chunk], log_total_N[chunk], grad_N[chunk])
            gradient_CV = logits_CV.to(hidden_CD.dtype)
            grad_hidden_CD = None if grad_hidden_ND is None else grad_hidden_ND[chunk]
            add_gradients(gradient_CV, hidden_CD, keep_N[chunk], head_VD, grad_hidden_CD, grad_head_VD)
            del logits_CV, gradient_CV
        return grad_hidden_ND, None if grad_head_VD is None else grad_head_VD.to(head_VD.dtype), None, None


def _overwrite(logits_CV: Tensor, labels_C: Tensor, keep_C: Tensor, log_total_C: Tensor, grad_C: Tensor) -> None:
    """Overwrite logits with their gradient: (1 at the label, minus the probabilities) times the incoming gradient."""
    for block in row_blocks(logits_CV):
        logits_RV, label_R1, grad_R1 = logits_CV[block], labels_C[block].unsqueeze(1), grad_C[block].unsqueeze(1)
        logits_RV.sub_(log_total_C[block].unsqueeze(1)).exp_()
        logits_RV.scatter_(1, label_R1, logits_RV.gather(1, label_R1) - 1.0)
        logits_RV.mul_(-grad_R1).masked_fill_(~keep_C[block].unsqueeze(1), 0.0)
