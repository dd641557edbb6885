"""What runs in a process group of its own: the timed turns of rows, the losses alone, or the ceilings."""

import contextlib
import gc
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .memory import PeakMemory
from .profiles import PROFILES, Profile, Row


def work(task: dict[str, Any]) -> None:
    """Run one task on this rank; rank 0 writes what was found. A rank of a group ends its process here.

    Args:
        task: `profile`, `steps`, `loss_repeats`, `rows` as dicts, `ceiling` (measure it), `alone` (no group: the loss
            alone), and `result`, a path. What is written has `rows` and `ceiling`.
    """
    profile = replace(PROFILES[task["profile"]], steps=task["steps"], loss_repeats=task["loss_repeats"])
    rows = [Row(**row) for row in task["rows"]]
    main = True
    if not task["alone"]:
        import transformers.models.llama.modeling_llama  # noqa: F401  # part of every row's idle process

        from minima.engine import distributed
        from minima.launcher import read_launch

        distributed.start(read_launch())
        main = distributed.is_main()
    found: dict[str, Any] = {"ceiling": _ceiling(profile) if task["ceiling"] else {}}
    found["rows"] = [_guarded(_time_loss if row.group == "loss" else _time_row, profile, row) for row in rows]
    if main:
        Path(task["result"]).write_text(json.dumps(found))
    if not task["alone"]:
        distributed.barrier()
        distributed.leave()


def _guarded(measure, profile: Profile, row: Row) -> dict[str, Any]:
    from .losses import Missing

    try:
        return measure(profile, row) | {"status": "measured"}
    except Missing as missing:
        return {"status": "missing", "reason": str(missing)}
    except torch.OutOfMemoryError:
        return {"status": "out of memory"}
    except Exception as error:  # one row that fails must not take the others' results with it
        if not profile.shared_process:  # its ranks may wait for each other: end here, and the parent writes the row
            raise
        traceback.print_exc()
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}"}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _time_row(profile: Profile, row: Row) -> dict[str, Any]:
    from minima.engine import distributed
    from minima.engine.traffic import Traffic

    from .losses import LOSS_MAKERS
    from .models import make_batches
    from .steps import build_step

    if row.what in LOSS_MAKERS:
        LOSS_MAKERS[row.what]()  # the peer's imports are part of the idle process
    device = distributed.device()
    gc.collect()
    memory = PeakMemory(device)
    built = build_step(profile, row)
    try:
        built.step(make_batches(profile, row, device, step=0))
        memory.reset()
        seconds, processor, loss = [], [], float("nan")
        for number in range(1, profile.steps + 1):
            batches = make_batches(profile, row, device, number)
            distributed.barrier()
            began, worked = time.perf_counter(), time.process_time()
            loss = built.step(batches)
            _synchronize(device)
            processor.append(time.process_time() - worked)
            distributed.barrier()
            seconds.append(time.perf_counter() - began)
        peaks = distributed.gather_objects(memory.peak_bytes())
        idles = distributed.gather_objects(memory.idle_bytes)
        # Counting slows a step, so it is one more; what moves are weights and gradients, however few the tokens.
        batches = make_batches(profile, row, device, profile.steps + 1, short=True)
        moved: dict[str, Any] = {"collective_bytes": None, "host_to_device_bytes": None}
        if row.what != "minima_compiled":  # whose code runs under no dispatch mode; it moves what `a:minima` does
            with (traffic := Traffic()):
                built.step(batches)
            moved = {"collective_bytes": traffic.collective_bytes, "host_to_device_bytes": traffic.host_to_device}
    finally:
        with contextlib.suppress(Exception):
            built.close()
    tokens = distributed.world_size() * row.micro_batch * row.micro_batches * profile.sequence_tokens
    above = max(peak - idle for peak, idle in zip(peaks, idles, strict=True))
    return {
        "micro_batch": row.micro_batch,
        "tokens": tokens,
        "seconds": seconds,
        "processor_seconds": processor,
        "loss": loss,
        "idle_bytes": max(idles),
        "peak_bytes": max(peaks),
        "peak_above_idle_bytes": above,
    } | moved


def _time_loss(profile: Profile, row: Row) -> dict[str, Any]:
    from minima.models.stock import DTYPES

    from .losses import LOSS_MAKERS

    loss = LOSS_MAKERS[row.what]()
    device = torch.device(profile.device)
    tokens, vocabulary = profile.loss_tokens, profile.student.vocabulary_size

    def inputs(num_tokens: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(3)
        sizes = [
            (num_tokens, profile.student.hidden_size),
            (vocabulary, profile.student.hidden_size),
            (num_tokens, profile.teacher.hidden_size),
            (vocabulary, profile.teacher.hidden_size),
        ]
        # Heads of 0.1 give logits with a standard deviation of a few units, as a trained model's have.
        scales = (1.0, 0.1, 1.0, 0.1)
        made = [
            torch.randn(size, generator=generator).mul_(scale).to(device, DTYPES[row.precision])
            for size, scale in zip(sizes, scales, strict=True)
        ]
        labels_N = torch.randint(0, vocabulary, (num_tokens,), generator=generator).to(device)
        return [*(tensor.requires_grad_(place < 2) for place, tensor in enumerate(made)), labels_N]

    def once(given: list[torch.Tensor]) -> float:
        for tensor in given[:2]:
            tensor.grad = None
        total = loss(*given)
        (total / given[-1].numel()).backward()
        _synchronize(device)
        return float(total.detach()) / given[-1].numel()

    once(inputs(tokens if device.type == "cuda" else min(tokens, 64)))
    given = inputs(tokens)
    gc.collect()
    memory = PeakMemory(device)
    memory.reset()
    seconds, processor, value = [], [], float("nan")
    for _ in range(profile.loss_repeats):
        began, worked = time.perf_counter(), time.process_time()
        value = once(given)
        processor.append(time.process_time() - worked)
        seconds.append(time.perf_counter() - began)
    peak = memory.peak_bytes()
    return {
        "tokens": tokens,
        "seconds": seconds,
        "processor_seconds": processor,
        "loss": value,
        "idle_bytes": memory.idle_bytes,
        "peak_bytes": peak,
        "peak_above_idle_bytes": peak - memory.idle_bytes,
    }


def _ceiling(profile: Profile) -> dict[str, float]:
    """What the machine can do, all ranks at once: the best of a few tries, summed over the ranks.

    `float32` and `bfloat16`: FLOP/s of a square matmul. `memory`: bytes/s, read and written, of a copy that is far
    larger than any cache; passes over dense logits go at this rate.
    """
    from minima.engine import distributed

    device, width, best = distributed.device(), profile.ceiling_width, {}

    def rate(amount: float, work: Callable[[], object]) -> float:
        rates = []
        for _ in range(6):
            distributed.barrier()
            _synchronize(device)
            began = time.perf_counter()
            work()
            _synchronize(device)
            rates.append(amount / (time.perf_counter() - began))
        return sum(distributed.gather_objects(max(rates)))

    for name in ("float32", "bfloat16"):
        dtype = getattr(torch, name)
        left, right = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
        best[name] = rate(2 * width**3, lambda left=left, right=right: left @ right)
    source = torch.ones(64 * width**2, dtype=torch.uint8, device=device)  # 256 MiB for a width of 2,048
    target = torch.empty_like(source)
    best["memory"] = rate(2 * source.numel(), lambda: target.copy_(source))
    return best
