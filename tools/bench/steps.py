"""One optimiser step of each tool. Those of the other tools are rebuilt from their documentation and code."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Protocol

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor
from transformers.models.llama import modeling_llama

from minima.batch import IGNORE_INDEX, Batch
from minima.engine.loop import train_step
from minima.engine.meters import Meters
from minima.engine.objectives.distillation import Distillation
from minima.engine.sharded import release

from .losses import LOSS_MAKERS, OtherLoss, liger_jsd, original_terms, trl_gkd
from .models import LEARNING_RATE, Root, frozen_model, minima_student, minima_teacher, peer_config, peer_student
from .profiles import Profile, Row


class Step(Protocol):
    """The step that a row times."""

    def step(self, micro_batches: list[Batch]) -> float:
        """Run one optimiser step and return the mean loss that the tool itself would report."""
        ...

    def close(self) -> None:
        """Release the memory."""
        ...


class MinimaStep:
    """minima's step, with its own loss or another one."""

    def __init__(self, profile: Profile, row: Row) -> None:
        loss = None if row.what.startswith("minima") else LOSS_MAKERS[row.what]()
        self._disk = tempfile.TemporaryDirectory() if row.offload == "nvme" else None
        self.teacher = minima_teacher(profile, row, Path(self._disk.name) if self._disk else None)
        self.student = minima_student(profile, row)
        self.objective = (
            Distillation(self.teacher, window=row.window)
            if loss is None
            else OtherLoss(loss, self.teacher, window=row.window)
        )
        self.meters = Meters(self.student.device)

    def step(self, micro_batches: list[Batch]) -> float:
        train_step(self.student, self.objective, micro_batches, LEARNING_RATE, self.meters)
        return self.meters.reduce()["loss"]

    def close(self) -> None:
        del self.objective
        self.student.close()
        self.teacher.close()
        if self._disk:
            self._disk.cleanup()


class _TwoEngines:
    """A student and a frozen teacher, each on a ZeRO-3 engine."""

    student: deepspeed.DeepSpeedEngine
    teacher: deepspeed.DeepSpeedEngine

    def close(self) -> None:
        for engine in (self.student, self.teacher):
            root, optimizer = engine.module, engine.optimizer
            engine.destroy()
            release(root, optimizer if engine is self.student else None)
        del self.student, self.teacher


class OriginalStep(_TwoEngines):
    """The original MiniMA's loop (arXiv 2311.07052), from its description, but without `CUDA_LAUNCH_BLOCKING=1`.

    Both engines have the student's configuration. The stock forwards compute dense logits for both models, and for each
    its own cross-entropy, of which the teacher's is not used. The loss is divided by the accumulation steps here and
    again by DeepSpeed, and reduced over the ranks for the log after every micro-batch.
    """

    def __init__(self, profile: Profile, row: Row) -> None:
        config = peer_config(profile, row)
        self.teacher = deepspeed.initialize(model=frozen_model(profile, row, config), config=config)[0]
        self.student = peer_student(profile, row)

    def _loss(self, batch: Batch) -> Tensor:
        fields = {"input_ids": batch.input_ids_BT, "labels": batch.labels_BT, "shift_labels": batch.labels_BT}
        with torch.no_grad():
            taught = self.teacher(**fields, use_cache=False)
        learnt = self.student(**fields, use_cache=False)
        soft = original_terms(learnt.logits, taught.logits) / batch.labels_BT.numel()
        return 0.5 * learnt.loss + 0.5 * soft

    def step(self, micro_batches: list[Batch]) -> float:
        total = 0.0
        for batch in micro_batches:
            loss = self._loss(batch) / len(micro_batches)
            self.student.backward(loss)
            self.student.step()
            logged = loss.detach().clone()
            dist.all_reduce(logged)
            total += logged.item() / dist.get_world_size()
        return total


class RecomputingOriginalStep(OriginalStep):
    """The same with activation checkpointing, which its training scripts always turn on."""

    def __init__(self, profile: Profile, row: Row) -> None:
        super().__init__(replace(profile, activation_checkpointing="full"), row)


class TrlStep(_TwoEngines):
    """TRL's GKD step: its own `compute_loss` and its own engine for the teacher, without its Trainer's loop."""

    def __init__(self, profile: Profile, row: Row) -> None:
        trainer = trl_gkd()
        from trl.models.utils import prepare_deepspeed

        config = peer_config(profile, row)
        accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config)))
        self.teacher = prepare_deepspeed(frozen_model(profile, row, config), accelerator)
        self.student = peer_student(profile, row)
        self._trainer = trainer
        self._fields = SimpleNamespace(
            teacher_model=self.teacher,
            beta=0.0,
            temperature=1.0,
            generalized_jsd_loss=trainer.generalized_jsd_loss,
        )

    def step(self, micro_batches: list[Batch]) -> float:
        count = sum((batch.labels_BT != IGNORE_INDEX).sum() for batch in micro_batches)
        total = 0.0
        for batch in micro_batches:
            tokens_BT = batch.input_ids_BT
            inputs = {"input_ids": tokens_BT, "attention_mask": torch.ones_like(tokens_BT), "labels": tokens_BT}
            loss = self._trainer.compute_loss(self._fields, self.student, inputs, num_items_in_batch=count)
            self.student.backward(loss, scale_wrt_gas=False)  # as accelerate calls it
            self.student.step()
            total += loss.item()
        return total

    def close(self) -> None:
        del self._fields
        super().close()


class LigerStep(_TwoEngines):
    """Backbones only, then Liger's fused linear loss: TRL's `use_liger_kernel` step, which TRL 1.x no longer has.

    Both heads are gathered while the loss runs. On a GPU Liger's fused norms, SwiGLUs and rotary embedding replace the
    stock ones of both models. The rotary embedding replaces a function of a whole module, which `close` restores.
    """

    def __init__(self, profile: Profile, row: Row) -> None:
        self._loss = liger_jsd(hard=0.0, soft=1.0)
        config = peer_config(profile, row)
        model = frozen_model(profile, row, config)
        self.teacher = deepspeed.initialize(model=Root(model), config=config)[0]
        self.student = peer_student(profile, row, rooted=True)
        self._stock_rotation = modeling_llama.apply_rotary_pos_emb
        if profile.device == "cuda":
            from liger_kernel.transformers import _apply_liger_kernel_to_instance

            for engine in (self.student, self.teacher):
                _apply_liger_kernel_to_instance(model=engine.module.model)

    def step(self, micro_batches: list[Batch]) -> float:
        total = 0.0
        head = self.teacher.module.model.get_output_embeddings().weight
        for batch in micro_batches:
            with torch.no_grad():
                taught_NE = self.teacher(_final_states, batch.input_ids_BT)
            with deepspeed.zero.GatheredParameters([head]):
                loss = self.student(self._student_loss, batch, taught_NE, head)
            loss = loss / len(micro_batches)
            self.student.backward(loss, scale_wrt_gas=False)
            self.student.step()
            total += loss.item()
        return total

    def _student_loss(self, model, batch: Batch, taught_NE: Tensor, head: Tensor) -> Tensor:
        hidden_ND = _final_states(model, batch.input_ids_BT)
        return self._loss(hidden_ND, model.get_output_embeddings().weight, taught_NE, head, batch.labels_BT.flatten())

    def close(self) -> None:
        modeling_llama.apply_rotary_pos_emb = self._stock_rotation
        super().close()


def _final_states(model, tokens_BT: Tensor) -> Tensor:
    return model.base_model(input_ids=tokens_BT, use_cache=False).last_hidden_state.flatten(0, 1)


STEPS: dict[str, Callable[[Profile, Row], Step]] = {
    "minima": MinimaStep,
    "minima_compiled": MinimaStep,
    "minima_stock": MinimaStep,
    "original": OriginalStep,
    "original_recomputing": RecomputingOriginalStep,
    "trl": TrlStep,
    "liger": LigerStep,
}


def build_step(profile: Profile, row: Row) -> Step:
    """Build the row's models and engines.

    Raises:
        Missing: the tool is not installed.
    """
    return STEPS[row.what](profile, row) if row.group == "b" else MinimaStep(profile, row)
