"""The work of one process group: the timed turns of rows, the losses alone, or the ceilings."""

import contextlib
import functools
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .memory import PeakMemory
from .profiles import PROFILES, Profile, Row
from .running import largest_that_fits


def work(task: dict[str, Any]) -> None:
    """Run one task on this rank; rank 0 writes the results. A rank of a process group ends its process here.

    Args:
        task: `profile`, `steps`, `loss_repeats`, `rows` as dicts, `ceiling` (measure it), `alone` (no process group,
            for the loss alone), `sizes` (find the largest micro-batch that fits), `num_kernels` (GPU kernels to list),
            `traces` (their folder, or empty), and `result`, a path. The file, written after each row, has `rows` and
            `ceiling`.
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
    if any(row.group == "b" for row in rows):
        _stay_within(profile)
    found: dict[str, Any] = {"ceiling": _ceiling(profile) if task["ceiling"] else {}, "rows": []}
    _write(found, task["result"], main)
    for row in rows:
        choose_products(row)
        if task["sizes"]:
            one = _guarded(functools.partial(_search, sizes=task["sizes"]), profile, row)
        elif row.group == "loss":
            one = _guarded(_time_loss, profile, row)
        else:
            timed = functools.partial(_time_row, num_kernels=task["num_kernels"], traces=task["traces"])
            one = _guarded(timed, profile, row)
        found["rows"].append(one)
        _write(found, task["result"], main)
    if not task["alone"]:
        distributed.barrier()
        distributed.leave()


def choose_products(row: Row) -> None:
    """Make minima's float32 products on a CPU PyTorch's own in a row whose name says so."""
    torch.backends.mkldnn.enabled = not row.what.endswith("_stock")


def _write(found: dict[str, Any], path: str, main: bool) -> None:
    if main:
        Path(path + ".part").write_text(json.dumps(found))
        os.replace(path + ".part", path)


def _stay_within(profile: Profile) -> None:
    """Limit the GPU memory to what the profile allows."""
    if profile.memory_bytes and profile.device == "cuda":
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, profile.memory_bytes / total))


def _search(profile: Profile, row: Row, sizes: list[int]) -> dict[str, Any]:
    """Find the largest micro-batch that fits: the same engines run two steps of each size, the smallest first."""
    from minima.engine import distributed

    from .models import make_batches
    from .steps import build_step

    built = build_step(profile, replace(row, micro_batch=sizes[0]))

    def attempt(sized: Row) -> dict[str, Any]:
        gc.collect()
        if profile.device == "cuda":
            torch.cuda.empty_cache()
        for step in range(2):
            built.step(make_batches(profile, sized, distributed.device(), step))
        return {}

    # Only profiles with a single rank search, so no rank waits for one that has failed.
    return largest_that_fits(row, sizes, lambda sized: _caught(lambda: attempt(sized)))


def _guarded(measure: Callable[[Profile, Row], dict[str, Any]], profile: Profile, row: Row) -> dict[str, Any]:
    return _caught(lambda: measure(profile, row), may_raise=not profile.shared_process)


def _caught(measure: Callable[[], dict[str, Any]], may_raise: bool = False) -> dict[str, Any]:
    """The measurement, or the reason why there is none.

    Args:
        may_raise: whether errors other than a missing tool or lack of memory are raised.
    """
    from .losses import Missing

    try:
        return {"status": "measured"} | measure()
    except Missing as missing:
        return {"status": "missing", "reason": str(missing)}
    except torch.OutOfMemoryError:
        return {"status": "out of memory"}
    except Exception as error:  # one failing row must not cost the others' results
        if may_raise:  # the ranks may be waiting for each other: end here, and the parent records the row
            raise
        traceback.print_exc()
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}"}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _time_row(profile: Profile, row: Row, num_kernels: int = 0, traces: str = "") -> dict[str, Any]:
    from minima.engine import distributed

    from .losses import LOSS_MAKERS
    from .models import make_batches
    from .steps import build_step
    from .traffic import TrafficCounter

    if row.what in LOSS_MAKERS:
        LOSS_MAKERS[row.what]()  # the peer's imports are part of the idle process
    device = distributed.device()
    gc.collect()
    memory = PeakMemory(device)
    built = build_step(profile, row)
    try:
        for _ in range(2 if device.type == "cuda" else 1):  # prefetching starts in the second step
            built.step(make_batches(profile, row, device, step=0))
        memory.reset()
        seconds, processor, loss = [], [], float("nan")
        for number in range(1, profile.steps + 1):
            batches = make_batches(profile, row, device, number)
            _synchronize(device)
            distributed.barrier()
            began, worked = time.perf_counter(), time.process_time()
            loss = built.step(batches)
            _synchronize(device)
            processor.append(time.process_time() - worked)
            distributed.barrier()
            seconds.append(time.perf_counter() - began)
        peaks = distributed.gather_objects(memory.peak_bytes())
        idles = distributed.gather_objects(memory.idle_bytes)
        # Counting traffic slows a step down, so it gets a step of its own; weights and gradients make up the traffic,
        # so a few tokens suffice.
        batches = make_batches(profile, row, device, profile.steps + 1, short=True)
        moved: dict[str, Any] = {"collective_bytes": None, "host_to_device_bytes": None}
        if row.what != "minima_compiled":  # compiled code bypasses dispatch modes; its traffic is that of `a:minima`
            with _without_costing_the_row("traffic"), TrafficCounter() as traffic:
                built.step(batches)
                moved = {"collective_bytes": traffic.collective_bytes, "host_to_device_bytes": traffic.host_to_device}
        if num_kernels and device.type == "cuda" and "minima" in row.what:
            trace = Path(traces, f"{row.name.replace(':', '-').replace(' ', '-')}.json.gz") if traces else None
            with _without_costing_the_row("kernels"):
                again = make_batches(profile, row, device, 1)
                moved["kernels"] = _kernels(lambda: built.step(again), num_kernels, trace)
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


@contextlib.contextmanager
def _without_costing_the_row(what: str) -> Iterator[None]:
    """Let a single rank keep the times that it has taken if a step beside them fails; several may wait for it."""
    from minima.engine import distributed

    try:
        yield
    except Exception:
        if distributed.world_size() > 1:
            raise
        traceback.print_exc()
        print(f"the row's {what} could not be measured", file=sys.stderr)


def _kernels(step: Callable[[], object], most: int, trace: Path | None) -> list[dict[str, Any]]:
    """The GPU kernels in which one step spends most of its time: `name`, `calls`, `seconds`."""
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CUDA, kinds.CPU] if trace else [kinds.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    if trace:
        try:
            trace.parent.mkdir(parents=True, exist_ok=True)
            profiled.export_chrome_trace(str(trace))
        except OSError as error:  # a missing trace must not cost the row
            print(f"no trace was written: {error}", file=sys.stderr)
    # Host operators also report the time of their kernels, so count only what ran on the GPU.
    kernels = [one for one in profiled.key_averages() if one.device_type == torch.autograd.DeviceType.CUDA]
    found = sorted(kernels, key=lambda one: -one.self_device_time_total)[:most]
    return [
        {"name": one.key[:120], "calls": one.count, "seconds": one.self_device_time_total / 1e6}
        for one in found
        if one.self_device_time_total
    ]


def _time_loss(profile: Profile, row: Row) -> dict[str, Any]:
    from minima.models.stock import DTYPES

    from .losses import LOSS_MAKERS

    loss = LOSS_MAKERS[row.what]()
    device = torch.device(profile.device)
    tokens, vocabulary = profile.loss_tokens, profile.student.vocabulary_size

    def inputs(num_tokens: int) -> list[torch.Tensor]:
        generator = torch.Generator(device).manual_seed(3)
        sizes = [
            (num_tokens, profile.student.hidden_size),
            (vocabulary, profile.student.hidden_size),
            (num_tokens, profile.teacher.hidden_size),
            (vocabulary, profile.teacher.hidden_size),
        ]
        # Heads scaled by 0.1 give logits with a standard deviation of a few units, like those of a trained model.
        scales = (1.0, 0.1, 1.0, 0.1)
        made = [
            torch.randn(size, generator=generator, device=device).mul_(scale).to(DTYPES[row.precision])
            for size, scale in zip(sizes, scales, strict=True)
        ]
        labels_N = torch.randint(0, vocabulary, (num_tokens,), generator=generator, device=device)
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
    """The machine's peak rates with all ranks working at once: the best of a few tries, summed over the ranks.

    `float32` and `bfloat16`: FLOP/s of a square matmul. Where minima's float32 products are not PyTorch's, PyTorch's
    are `float32 stock`. `memory`: bytes/s, read plus written, of a copy that is far larger than any cache; this rate
    bounds passes over dense logits.
    """
    from minima import cpu_products
    from minima.engine import distributed

    device, width, best = distributed.device(), profile.ceiling_width, {}

    repeats = 20 if device.type == "cuda" else 1  # one product takes a GPU only a millisecond

    def rate(amount: float, work: Callable[[], object]) -> float:
        rates = []
        for _ in range(6):
            distributed.barrier()
            _synchronize(device)
            began = time.perf_counter()
            for _ in range(repeats):
                work()
            _synchronize(device)
            rates.append(repeats * amount / (time.perf_counter() - began))
        return sum(distributed.gather_objects(max(rates)))

    for name in ("float32", "bfloat16"):
        dtype = getattr(torch, name)
        left, right = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
        best[name] = rate(2 * width**3, lambda left=left, right=right: left @ right)
        if cpu_products.is_faster(left, right):
            best[f"{name} stock"] = best[name]
            best[name] = rate(2 * width**3, lambda left=left, right=right: cpu_products.product(left, right))
    source = torch.ones(64 * width**2, dtype=torch.uint8, device=device)  # 256 MiB for a width of 2,048
    target = torch.empty_like(source)
    best["memory"] = rate(2 * source.numel(), lambda: target.copy_(source))
    return best
