"""The checks of `minima doctor` that need torch: each rank's device, and operations of all ranks together."""

import datetime
import fcntl
import os
import secrets
import socket
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.utils import cpp_extension

from minima.cluster.doctor_machine import Finding, guarded
from minima.engine import distributed
from minima.launcher import Launch, node_name
from minima.stages.manifest import NFS_SECONDS, look_again
from minima.triton_driver import CURE, triton_trouble

_JOIN_SECONDS = 120  # a rank that has not joined by then never will
_REACH_SECONDS = 60
_LARGE_BYTES = {"cpu": 16 << 20, "gpu": 256 << 20}  # large enough to make latency negligible
_SMALL_BYTES = 4 << 10
_REPEATS = 5
_SLOW_BYTES_PER_SECOND = 1e9  # slower than any GPU link or modern network card, so NCCL must be using something else
_SKEW_SECONDS = 2.0
_hosts: list[str] = []


def join(launch: Launch) -> Finding:
    """Join the process group, with a timeout short enough for a user who is waiting."""
    check = "ranks"
    at = f"{launch.master_address}:{launch.master_port}"
    if launch.rank != 0 and (refused := _unreachable(launch)):
        do = (
            "make sure that the machines can resolve each other's names and that no firewall is between them, or "
            "export MASTER_ADDR with an address of rank 0's machine that the others can reach"
        )
        return Finding(check, "FAILED", f"rank {launch.rank} cannot reach rank 0 at {at}: {refused}", do)
    try:
        distributed.start(launch, datetime.timedelta(seconds=_JOIN_SECONDS))
        distributed.barrier()
        _hosts[:] = distributed.gather_objects(node_name())
    except Exception as error:  # from torch, DeepSpeed, NCCL or the network: any error is a finding
        do = "check that every rank was started and can reach rank 0; NCCL_DEBUG=INFO shows more"
        said = " ".join(str(error).split())[:300]
        return Finding(check, "FAILED", f"the process group at {at} cannot be set up: {said}", do)
    counts = Counter(_hosts)
    if launch.world_size == 1:
        return Finding(check, "ok", "one process; start under a launcher to check all ranks together")
    found = ", ".join(f"{count} on {host}" for host, count in counts.items())
    wrong = distributed.gather_objects(counts[node_name()] != launch.local_world_size)
    if any(wrong):
        do = "the launcher's number of ranks per machine is wrong: check its variables (LOCAL_WORLD_SIZE)"
        return Finding(check, "warning", f"{found}; rank {wrong.index(True)} was told a different number", do)
    return Finding(check, "ok", found)


def _unreachable(launch: Launch) -> str | None:
    until, said = time.monotonic() + _REACH_SECONDS, ""
    while time.monotonic() < until:
        try:
            with socket.create_connection((launch.master_address, launch.master_port), timeout=5):
                return None
        except OSError as error:  # rank 0 may start a little later
            said = str(error)
        time.sleep(0.2)
    return said


def hosts() -> list[str]:
    """The machine of each rank."""
    return list(_hosts)


def gather(findings: list[Finding]) -> dict[int, list[Finding]]:
    """The findings of every rank, by rank."""
    return dict(enumerate(distributed.gather_objects(findings)))


def leave(code: int) -> int:
    """Leave the process group; returns rank 0's exit code on every rank."""
    code = int(distributed.broadcast_object(code))
    distributed.stop()
    return code


def check_device(launch: Launch) -> list[Finding]:
    """Check this rank's GPU, if any, and whether the kernels that are compiled on first use can be built."""
    findings = [guarded("GPU", lambda: _gpu(launch)), guarded("DeepSpeed's ops", _ops)]
    return findings if distributed.device().type == "cpu" else [*findings, guarded("Triton", _triton)]


def _gpu(launch: Launch) -> Finding:
    if distributed.device().type == "cpu":
        return Finding("GPU", "ok", f"none; on the CPU with {torch.get_num_threads()} threads per rank")
    if launch.world_size == 1:
        every = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        return Finding("GPU", "ok", "; ".join(f"{one.name}, {one.total_memory / 2**30:.0f} GiB" for one in every))
    own = torch.cuda.get_device_properties(distributed.device())
    free, total = torch.cuda.mem_get_info()
    found = f"{own.name}, {total / 2**30:.0f} GiB"
    if free < 0.9 * total:
        do = "end other processes that use it (nvidia-smi), or request whole nodes (exclusive)"
        return Finding("GPU", "warning", f"{found}, of which {free / 2**30:.0f} GiB are free", do)
    return Finding("GPU", "ok", found)


def _ops() -> Finding:
    use = "only a teacher with offload nvme needs one"
    lacks = None
    if not get_accelerator().create_op_builder("AsyncIOBuilder").is_compatible(verbose=False):
        lacks = "libaio-dev (Debian), libaio-devel (Fedora) or a C compiler"
    elif distributed.device().type != "cpu" and cpp_extension.CUDA_HOME is None:
        lacks = "the CUDA toolkit (CUDA_HOME)"
    if lacks is None:
        return Finding("DeepSpeed's ops", "ok", f"{use}, which is built on first use")
    return Finding("DeepSpeed's ops", "ok", f"{use}, which could not be built here: {lacks} is missing")


def _triton() -> Finding:
    if (trouble := triton_trouble()) is None:
        return Finding("Triton", "ok", "kernels can be started")
    found = f"kernels cannot be started, so losses and attention are slower and compile: true is refused: {trouble}"
    return Finding("Triton", "warning", found, CURE)


def check_together(launch: Launch, folder: Path) -> list[Finding]:
    """The checks that need all ranks at once; every rank calls it, and rank 0 reports the findings."""
    if launch.world_size == 1:
        return []
    findings = [_all_reduce(), _own_gpus()]
    # If the folder is missing or unreadable on rank 0, its disk check reports that; `Path.is_dir` could raise.
    if distributed.broadcast_object(os.path.isdir(folder)):
        findings += [_shared(folder), _locks_across(folder)]
    return [*findings, _clocks()]


def _all_reduce() -> Finding:
    device, ranks = distributed.device(), distributed.world_size()
    kind = "cpu" if device.type == "cpu" else "gpu"
    expected = ranks * (ranks + 1) / 2  # the sum of rank + 1 over all ranks, an integer exact in float32
    told, right, speed = [], True, 0.0
    for size in (_SMALL_BYTES, _LARGE_BYTES[kind]):
        tensor, seconds = torch.empty(size // 4, device=device), []
        for _ in range(_REPEATS):
            tensor.fill_(distributed.rank() + 1)
            _wait(device)
            distributed.barrier()
            began = time.perf_counter()
            distributed.all_reduce_sum(tensor)
            _wait(device)
            seconds.append(time.perf_counter() - began)
            right &= bool((tensor == expected).all())
        slowest = distributed.all_reduce_max(sorted(seconds)[len(seconds) // 2])
        speed = 2 * (ranks - 1) / ranks * size / slowest  # what each rank sends, the bus bandwidth of nccl-tests
        told.append(f"{_bytes(size)} in {slowest * 1e3:.2f} ms")
    wrong = [rank for rank, one in enumerate(distributed.gather_objects(right)) if not one]
    backend = dist.get_backend()
    if wrong:
        where = ", ".join(sorted({_hosts[rank] for rank in wrong}))
        do = f"data is corrupted on the way to {where}: exclude it (sbatch --exclude), and tell the administrators"
        return Finding("all-reduce", "FAILED", f"{backend}: wrong sums on rank {', '.join(map(str, wrong))}", do)
    text = f"{backend}: correct; {', '.join(told)}, {speed / 1e9:.2f} GB/s per rank"
    if kind == "gpu" and speed < _SLOW_BYTES_PER_SECOND:
        do = (
            "NCCL has found no fast connection: NCCL_DEBUG=INFO shows which it uses (choose one with "
            "NCCL_SOCKET_IFNAME, NCCL_IB_HCA)"
        )
        return Finding("all-reduce", "warning", text, do)
    return Finding("all-reduce", "ok", text)


def _own_gpus() -> Finding:
    device = distributed.device()
    own = None if device.type == "cpu" else str(getattr(torch.cuda.get_device_properties(device), "uuid", device))
    holders: dict[Any, list[int]] = {}
    for rank, uuid in enumerate(distributed.gather_objects(own)):
        if uuid is not None:
            holders.setdefault((_hosts[rank], uuid), []).append(rank)
    twice = [ranks for ranks in holders.values() if len(ranks) > 1]
    if twice:
        do = "start one rank for each GPU: use fewer ranks per machine, or make more GPUs visible"
        return Finding(
            "a GPU each", "FAILED", f"ranks {', '.join(map(str, twice[0]))} share one on {_hosts[twice[0][0]]}", do
        )
    return Finding("a GPU each", "ok", "every rank has its own" if holders else "on the CPU")


def _shared(folder: Path) -> Finding:
    """Check that every rank can read what rank 0 writes."""
    token, error = str(distributed.broadcast_object(secrets.token_hex(16))), ""
    path = folder / f".minima-doctor-{token}"
    if distributed.is_main():
        try:
            path.write_text(token, encoding="ascii")
        except OSError as met:
            error = str(met)
    error = str(distributed.broadcast_object(error))
    began, seen = time.monotonic(), False
    while not error and not (seen := _reads(path, token)) and time.monotonic() < began + NFS_SECONDS:
        look_again(path)
        time.sleep(0.2)
    waited = distributed.gather_objects((seen, time.monotonic() - began))
    _remove(path)
    if error:
        return Finding("shared folder", "FAILED", f"rank 0 cannot write: {error}", "name another folder with --folder")
    blind = [rank for rank, (saw, _) in enumerate(waited) if not saw]
    if blind:
        where = ", ".join(f"{rank} ({_hosts[rank]})" for rank in blind)
        do = f"use a folder that all machines share (--folder, output=); {folder.absolute()} is not one"
        return Finding("shared folder", "FAILED", f"rank {where} does not see what rank 0 ({_hosts[0]}) writes", do)
    return Finding("shared folder", "ok", f"all ranks see it, the last after {max(one for _, one in waited):.1f} s")


def _reads(path: Path, token: str) -> bool:
    try:
        return path.read_text(encoding="ascii") == token
    except OSError:
        return False


def _remove(path: Path) -> None:
    if distributed.is_main():
        with suppress(OSError):  # fails too if writing the file failed, but the other ranks must not be left waiting
            path.unlink()


def _locks_across(folder: Path) -> Finding:
    """Check that a lock held by rank 0 blocks ranks on other machines."""
    name = str(distributed.broadcast_object(secrets.token_hex(16)))
    path, refused = folder / f".minima-doctor-{name}", True
    with ExitStack() as stack:
        own = None
        with suppress(OSError):  # the machine's own check reports it; this rank must still reach the barriers
            own = stack.enter_context(path.open("ab"))
            if distributed.is_main():
                fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
        distributed.barrier()
        if own is not None and not distributed.is_main():
            refused = _is_refused(own)
        distributed.barrier()
    both = [rank for rank, one in enumerate(distributed.gather_objects(refused)) if not one]
    _remove(path)
    if both:
        do = "locks work within one machine only: make sure that no two jobs share a run's folder"
        where = ", ".join(sorted({_hosts[rank] for rank in both}))
        return Finding("locks between machines", "warning", f"rank 0's lock has no effect on {where}", do)
    return Finding("locks between machines", "ok", "rank 0's lock blocks every other rank")


def _is_refused(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def _clocks() -> Finding:
    skews = []
    for _ in range(3):  # the smallest of three, because a delayed rank looks like a skewed clock
        distributed.barrier()
        times = distributed.gather_objects(time.time())
        skews.append((max(times) - min(times), _hosts[times.index(max(times))], _hosts[times.index(min(times))]))
    skew, ahead, behind = min(skews)
    if skew > _SKEW_SECONDS:
        do = "synchronise the clocks of all machines (chrony or ntpd): times of logs and files are misleading"
        return Finding("clocks", "warning", f"{ahead} is {skew:.1f} s ahead of {behind}", do)
    return Finding("clocks", "ok", f"within {skew:.2f} s of each other")


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.cuda.synchronize(device)


def _bytes(count: int) -> str:
    return f"{count >> 20} MiB" if count >= 1 << 20 else f"{count >> 10} KiB"
