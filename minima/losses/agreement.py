"""Student-teacher agreement from hidden states; logits are materialised for one chunk of tokens at a time.

Shapes: N tokens, C tokens of one chunk, D student width, E teacher width, V vocabulary.
"""

import torch
from torch import Tensor

from minima.batch import IGNORE_INDEX
from minima.losses.checks import check_chunk, check_tokens
from minima.losses.linear import float_logits, logits_head
from minima.losses.linear_distillation import check_vocabularies


def linear_agreement(
    student_hidden_ND: Tensor,
    student_head_VD: Tensor,
    teacher_hidden_NE: Tensor,
    teacher_head_VE: Tensor,
    labels_N: Tensor,
    *,
    chunk_tokens: int = 1024,
    ignore_index: int = IGNORE_INDEX,
) -> dict[str, Tensor]:
    """How closely a student follows a teacher over the valid tokens; no gradients.

    Args:
        student_hidden_ND: this and the other arguments are as for `linear_distillation_loss`.

    Returns:
        Sums over valid tokens: `kl`, KL(teacher || student) in nats; `same_top1`, tokens for which both models agree on
        the most likely next token; `count`, valid tokens.

    Raises:
        VocabularyMismatch: the two heads have different numbers of rows.
        MinimaError: the numbers of tokens or the widths do not match, or `chunk_tokens` is below 1.
    """
    check_vocabularies(student_head_VD.shape[0], teacher_head_VE.shape[0])
    student, teacher = (student_hidden_ND, student_head_VD), (teacher_hidden_NE, teacher_head_VE)
    check_tokens(labels_N, ignore_index, student=student, teacher=teacher)
    check_chunk(chunk_tokens)
    keep_N = labels_N != ignore_index
    kl = torch.zeros((), dtype=torch.float64, device=labels_N.device)
    same = torch.zeros((), dtype=torch.int64, device=labels_N.device)
    with torch.no_grad():
        student_float_VD = logits_head(student_head_VD, student_hidden_ND.dtype)
        teacher_float_VE = logits_head(teacher_head_VE, teacher_hidden_NE.dtype)
        for start in range(0, labels_N.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            student_CV = float_logits(student_hidden_ND[chunk], student_float_VD)
            teacher_CV = float_logits(teacher_hidden_NE[chunk], teacher_float_VE)
            same += ((student_CV.argmax(-1) == teacher_CV.argmax(-1)) & keep_N[chunk]).sum()
            log_student_CV, log_teacher_CV = student_CV.log_softmax(-1), teacher_CV.log_softmax(-1)
            kl_C = (log_teacher_CV.exp() * (log_teacher_CV - log_student_CV)).sum(-1)
            kl += kl_C.masked_fill(~keep_N[chunk], 0.0).sum()
    return {"kl": kl, "same_top1": same, "count": keep_N.sum()}
