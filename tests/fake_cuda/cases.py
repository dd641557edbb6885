"""Losses and training steps on CUDA tensors without storage: `python -m tests.fake_cuda.cases LIBRARY losses|steps`.

`FakeTensorMode` computes devices, dtypes and shapes, and runs no kernel. So it raises where a tensor was made on the
wrong device, where a product does not take a dtype, and where the host would need a value that the GPU has not computed
yet. Prints a line of JSON for each case: its `name`, the places where the host waits (`waits`: function and operator),
and an `error`, or null; one is that a fused kernel was not used where it should be, or was where it should not.

Shapes: N tokens, V vocabulary, D student width, E teacher width, B sequences, T positions.
"""

import ctypes
import sys

if __name__ == "__main__":
    ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)  # before torch looks for a device

import contextlib
import json
import os
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import minima
import minima.engine.loop as loop
import minima.losses.triton_kernels as triton_kernels
import minima.losses.way as way
import minima.models.attention as attention
from minima.batch import make_batch
from minima.engine.meters import Meters
from minima.engine.objectives.distillation import Distillation
from minima.engine.objectives.language_modelling import LanguageModelling
from minima.engine.objectives.preference import Preference
from minima.losses import linear_cross_entropy, linear_distillation_loss, linear_token_log_probs
from minima.models.causal_lm import head_weight, hidden_states
from minima.models.compiling import recompute
from minima.models.shape import ModelShape
from minima.models.stock import build_empty

CUDA = torch.device("cuda:0")
FUSED: dict[str, set[str]] = {"auto": {"loss"}, "eager": set()}
OURS = f"{Path(minima.__file__).parent}{os.sep}"
USED: Counter[str] = Counter()  # calls of the two fused kernels by a case
Case = tuple[str, Callable[[], object], set[str]]  # name, what it runs, and the fused kernels that it has to use


class Waits(TorchDispatchMode):
    """Lists where the host reads a value of the GPU, or copies between both so that it waits."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2"):
            self._note(name)
        elif any(index is not None and index.dtype == torch.bool for index in indices):
            self._note("a mask as an index")
        elif name == "_to_copy" and not kwargs.get("non_blocking"):
            self._note_copy(args[0].device, kwargs.get("device"))
        elif name == "copy_" and not (args[2] if len(args) > 2 else kwargs.get("non_blocking")):
            self._note_copy(args[1].device, args[0].device)
        return func(*args, **kwargs)

    def _note_copy(self, source: torch.device, target: Any) -> None:
        if target is not None and torch.device(target).type != source.type:
            self._note(f"a copy from {source.type} to {torch.device(target).type}")

    def _note(self, what: str) -> None:
        ours = [frame for frame in traceback.extract_stack() if frame.filename.startswith(OURS)]
        self.found.append(f"{ours[-1].name if ours else 'elsewhere'}: {what}")


class KernelCheck:
    """Stands for the Triton kernel, and checks what it is given."""

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*args: Any, **_: Any) -> None:
            USED["loss"] += 1
            student, teacher, gradient, labels, keep, losses = args[:6]
            for tensor in (student, teacher, gradient, labels, keep, losses):
                assert tensor.device == CUDA and tensor.is_contiguous(), (tensor.device, tensor.stride())
            assert student.dtype == teacher.dtype == losses.dtype == torch.float32
            assert labels.dtype == torch.int64 and keep.dtype == torch.bool
            assert grid == (len(student),) and len(student) == len(gradient) == len(labels) == len(keep) == len(losses)

        return launch


def flex_check(query: Tensor, key: Tensor, value: Tensor, block_mask: Any, **_: Any) -> Tensor:
    """Stands for the compiled flex attention: checks what it is given, and returns what has its shape and dtype."""
    USED["attention"] += 1
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices"):
        table = getattr(block_mask, name)
        assert table.device == CUDA and table.dtype == torch.int32, (name, table.device, table.dtype)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def made(*shape: int, dtype: torch.dtype, grad: bool = False) -> Tensor:
    """A tensor on the device that is not there."""
    return torch.empty(shape, dtype=dtype, device=CUDA, requires_grad=grad)


def losses() -> Iterator[Case]:
    """Every loss in every dtype, with the gradients' dtypes and devices checked."""
    num_tokens, vocabulary, student_width, teacher_width = 1300, 1008, 64, 96
    cuts: tuple[dict[str, Any], ...] = ({"top_k": 8}, {"top_p": 0.9}, {"top_k": 64, "top_p": 0.9})

    def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        student = made(num_tokens, student_width, dtype=dtype, grad=True)
        student_head = made(vocabulary, student_width, dtype=dtype, grad=True)
        teacher = made(num_tokens, teacher_width, dtype=dtype)
        labels = made(num_tokens, dtype=torch.int64)
        return student, student_head, teacher, made(vocabulary, teacher_width, dtype=dtype), labels

    def check(total: Tensor, *leaves: Tensor) -> None:
        (total / 7).backward()
        assert total.dtype == torch.float32 and total.device == CUDA
        for leaf in leaves:
            assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype and leaf.grad.device == CUDA

    def distillation(dtype: torch.dtype, **options: Any) -> None:
        student, student_head, teacher, teacher_head, labels = inputs(dtype)
        loss = linear_distillation_loss(student, student_head, teacher, teacher_head, labels, **options)
        check(loss.total, student, student_head)
        assert all(part.device == CUDA for part in (*loss.parts.values(), loss.count))

    def others(dtype: torch.dtype) -> None:
        student, student_head, _, _, labels = inputs(dtype)
        check(linear_cross_entropy(student, student_head, labels).total, student, student_head)
        check(linear_token_log_probs(student, student_head, labels).sum(), student, student_head)

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield f"{dtype} others", lambda dtype=dtype: others(dtype), {"loss"}
        for divergence, kernel in product(triton_kernels._NUMBERS, ("auto", "eager")):
            options = {"divergence": divergence, "kernel": kernel, "temperature": 2.0 if kernel == "eager" else 1.0}
            yield (
                f"{dtype} {options}",
                lambda dtype=dtype, options=options: distillation(dtype, **options),
                FUSED[kernel],
            )
        for cut in cuts:
            yield f"{dtype} {cut}", lambda dtype=dtype, cut=cut: distillation(dtype, **cut), set()
    only_labels = {"soft_weight": 0.0, "zero_parts": True}
    yield f"{only_labels}", lambda: distillation(torch.bfloat16, **only_labels), {"loss"}


class Student:
    """What `train_step` needs of an engine."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def __call__(self, objective: Any, batch: Any) -> Any:
        return objective(self.model, batch)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> float:
        return 0.0


class Teacher:
    """What the objectives need of a frozen model: for distillation, and for preferences."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.head_VE = model, head_weight(model).detach()

    def window(self, batches: Any) -> list[Tensor]:
        with torch.no_grad():
            return [hidden_states(self.model, batch) for batch in batches]

    def __call__(self, batch: Any) -> Tensor:
        return made(len(batch.input_ids_BT), 2, dtype=torch.float32)


def steps() -> Iterator[Case]:
    """A whole step of two micro-batches for each family, dtype and objective, with and without documents."""

    def step(family: str, dtype: torch.dtype, documents: bool, kind: str) -> None:
        shared = {} if family in ("gpt_neox", "gpt2") else {"num_key_value_heads": 2}
        shape = ModelShape(
            family=family, vocabulary_size=96, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4,
            max_positions=256, **shared,
        )  # fmt: skip
        models = [_on_cuda(build_empty(shape.to_config(), dtype)) for _ in range(2)]
        recompute(models[0].train(), "full" if documents else "selective")
        ids = made(2, 256, dtype=torch.int64)
        batch = make_batch(ids, documents_BT=torch.zeros_like(ids) if documents else None)
        batch = batch._replace(samples=(0, 1), num_documents=2)
        teacher: Any = Teacher(models[1].eval())
        objective = {
            "distil": lambda: Distillation(teacher),
            "language modelling": lambda: LanguageModelling(neftune_alpha=0.0),
            "preference": lambda: Preference(teacher),
        }[kind]()
        meters = Meters(CUDA)
        with contextlib.suppress(DataDependentOutputException):  # at the step's end, where the votes are read
            loop.train_step(Student(models[0]), objective, [batch, batch], 1e-3, meters)  # type: ignore[arg-type]
        for name, weight in models[0].named_parameters():
            assert weight.grad is not None and weight.grad.dtype == dtype and weight.grad.device == CUDA, name

    families = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gpt2")
    for family, dtype in (*((family, torch.bfloat16) for family in families), ("llama", torch.float32)):
        for documents, kind in (
            (True, "distil"),
            (False, "distil"),
            (True, "language modelling"),
            (True, "preference"),
        ):
            name = f"{family} {dtype} {kind}{' with documents' if documents else ''}"
            used = ({"loss"} if kind != "preference" else set()) | (
                {"attention"} if documents and family != "gpt2" else set()
            )
            yield name, lambda given=(family, dtype, documents, kind): step(*given), used


def _on_cuda(model: torch.nn.Module) -> torch.nn.Module:
    moved: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:  # tied weights stay tied
                new = torch.nn.Parameter(made(*weight.shape, dtype=weight.dtype))
                module._parameters[name] = moved.setdefault(id(weight), new)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = made(*buffer.shape, dtype=buffer.dtype)
    return model


def main() -> None:
    """Run the cases that the second argument names."""
    way.triton_trouble = attention.triton_trouble = lambda: None
    triton_kernels._rows = KernelCheck()  # type: ignore[assignment]
    attention.compiled_flex_attention = lambda: flex_check
    loop.all_reduce_sum = lambda tensor: tensor
    for name, run, expected in {"losses": losses, "steps": steps}[sys.argv[2]]():
        error = None
        USED.clear()
        with FakeTensorMode(), Waits() as waits:
            try:
                run()
            except Exception:
                error = traceback.format_exc()
        if error is None and set(USED) != expected:
            error = f"it has to use the fused kernels {sorted(expected)}, and has used {dict(USED)}"
        print(json.dumps({"name": name, "waits": waits.found, "error": error}), flush=True)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # autograd's thread for the device may abort an interpreter that is being finalised
