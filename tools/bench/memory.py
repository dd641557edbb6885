"""A rank's peak memory, relative to what it holds before any model is built."""

import contextlib
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _resident(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


class PeakMemory:
    """Measures the bytes in use on one device.

    On a GPU it reads the allocator's own peak of live tensors. On a CPU it reads the kernel's high-water mark of the
    process's resident memory, which unlike a sampler cannot miss a peak; writing to `/proc/self/clear_refs` resets it.

    Args:
        device: where the models are. The idle level is the memory in use when this object is created.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.idle_bytes = self.current_bytes()

    def current_bytes(self) -> int:
        """The memory in use now."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return _resident("VmRSS")

    def reset(self) -> None:
        """Start measuring a new peak."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with contextlib.suppress(OSError):  # refused in some containers: the peak then counts from the start
                _CLEAR.write_text("5")

    def peak_bytes(self) -> int:
        """The peak since the last reset."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _resident("VmHWM")
