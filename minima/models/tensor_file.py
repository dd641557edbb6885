"""Write safetensors files with the usual permissions, not readable by the owner alone."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors to a file with the permissions of any other new file of this process.

    safetensors makes its files readable by their owner alone, whatever the umask, so colleagues who share a run's
    folder could neither resume from its checkpoints nor read its scores.

    Raises:
        OSError, SafetensorError: the file cannot be written.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata=metadata)
    if path.stat().st_mode != mode:
        with suppress(OSError):  # a file system that does not support modes must not cost us a checkpoint
            path.chmod(mode)
