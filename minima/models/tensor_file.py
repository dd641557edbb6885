"""A safetensors file that whoever may read the folder may read, too."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors with the permissions that any other new file of this process has.

    safetensors makes its files readable for their owner alone, whatever the umask says: colleagues who share a run's
    folder could neither go on from its checkpoints nor read its scores.

    Raises:
        OSError, SafetensorError: the file cannot be written.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata=metadata)
    if path.stat().st_mode != mode:
        with suppress(OSError):  # a file system without modes of its own is no reason to lose a checkpoint
            path.chmod(mode)
