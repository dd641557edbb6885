"""Each tool's loss as one function of hidden states and heads, and as an objective for minima's own step.

Shapes: N tokens, D student width, E teacher width, V vocabulary.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from minima.batch import IGNORE_INDEX, Batch
from minima.engine.objectives.distillation import Distillation
from minima.losses import LossSum, linear_distillation_loss
from minima.models.causal_lm import head_weight, hidden_states

# student_hidden_ND, student_head_VD, teacher_hidden_NE, teacher_head_VE, labels_N -> a sum over tokens
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Missing(Exception):
    """A tool cannot be measured here; the message says why."""


def original_terms(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """The original's soft part as a sum: softmaxes over the whole vocabulary in the logits' own dtype."""
    return -(teacher_NV.softmax(-1) * student_NV.log_softmax(-1)).sum()


def _minima() -> Loss:
    return lambda *inputs: linear_distillation_loss(*inputs).total


def _dense() -> Loss:
    def loss(
        student_ND: Tensor, head_VD: Tensor, teacher_NE: Tensor, teacher_head_VE: Tensor, labels_N: Tensor
    ) -> Tensor:
        student_NV = student_ND @ head_VD.t()
        with torch.no_grad():
            teacher_NV = teacher_NE @ teacher_head_VE.t()
        # The stock models' loss computes the softmax for the labels in float32.
        hard = functional.cross_entropy(student_NV.float(), labels_N, ignore_index=IGNORE_INDEX, reduction="sum")
        return 0.5 * hard + 0.5 * original_terms(student_NV, teacher_NV)

    return loss


def _trl() -> Loss:
    trainer = trl_gkd()

    def loss(
        student_ND: Tensor, head_VD: Tensor, teacher_NE: Tensor, teacher_head_VE: Tensor, labels_N: Tensor
    ) -> Tensor:
        with torch.no_grad():
            teacher_NV = teacher_NE @ teacher_head_VE.t()
        return trainer.generalized_jsd_loss(
            (student_ND @ head_VD.t())[None], teacher_NV[None], labels_N[None], beta=0.0, reduction="sum"
        )

    return loss


def _trl_chunked() -> Loss:
    trl_gkd()
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    def loss(
        student_ND: Tensor, head_VD: Tensor, teacher_NE: Tensor, teacher_head_VE: Tensor, labels_N: Tensor
    ) -> Tensor:
        valid_N = labels_N != IGNORE_INDEX
        return _chunked_divergence_loss(
            student_ND[None], teacher_NE[None], head_VD, teacher_head_VE, valid_N[None], beta=0.0, num_items_in_batch=1
        )[0]

    return loss


def _liger() -> Loss:
    function = liger_jsd(hard=0.5, soft=0.5)

    def loss(
        student_ND: Tensor, head_VD: Tensor, teacher_NE: Tensor, teacher_head_VE: Tensor, labels_N: Tensor
    ) -> Tensor:
        mean = function(student_ND, head_VD, teacher_NE, teacher_head_VE, labels_N)
        return mean * (labels_N != IGNORE_INDEX).sum()

    return loss


def trl_gkd():
    """TRL's trainer that uses the same forward KL.

    Raises:
        Missing: TRL is not installed, or no longer has this trainer.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the warning that it is experimental
            from trl.experimental.gkd import GKDTrainer
    except ImportError as error:
        raise Missing(f"TRL cannot be imported ({error}); install the extra `bench`") from error
    return GKDTrainer


def liger_jsd(hard: float, soft: float):
    """Liger's fused linear loss with a beta of 0, which is the forward KL.

    Raises:
        Missing: liger-kernel is not installed, or cannot be imported here.
    """
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError as error:
        raise Missing(f"liger-kernel cannot be imported ({error}); install the extra `bench`") from error
    # The compiled version is Liger's default, although TRL turns it off; on a CPU it would time the compiler.
    compiled = torch.cuda.is_available()
    return LigerFusedLinearJSDLoss(hard, soft, beta=0.0, ignore_index=IGNORE_INDEX, compiled=compiled)


LOSS_MAKERS: dict[str, Callable[[], Loss]] = {
    "minima": _minima,
    "minima_stock": _minima,
    "dense": _dense,
    "trl": _trl,
    "trl_chunked": _trl_chunked,
    "liger": _liger,
}


class OtherLoss(Distillation):
    """minima's objective with only the loss replaced."""

    def __init__(self, loss: Loss, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self._loss = loss

    def __call__(self, model, batch: Batch) -> LossSum:
        assert batch.teacher_hidden_BTE is not None and self.teacher_head_VE is not None, "prepare() runs first"
        hidden_ND = hidden_states(model, batch).flatten(0, 1)
        teacher_NE = batch.teacher_hidden_BTE.flatten(0, 1)
        total = self._loss(hidden_ND, head_weight(model), teacher_NE, self.teacher_head_VE, batch.labels_BT.flatten())
        return LossSum(total, self.count(batch), {})
