"""How much of the host's memory a process may use."""

from pathlib import Path

import psutil

_GROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def host_memory_bytes(groups: Path = _GROUPS, own: Path = _OWN) -> int:
    """This host's memory, or the limit that a container or a job sets on it.

    Args:
        groups: mount point of the control groups, version 2 or 1.
        own: the kernel's list of the groups that this process is in.
    """
    limits = [psutil.virtual_memory().total]
    for path in _limit_files(groups, own):
        text = path.read_text().strip() if path.is_file() else ""
        limits += [int(text)] if text.isdigit() else []  # `max` means no limit
    return min(limits)


def _limit_files(groups: Path, own: Path) -> list[Path]:
    """The limit files of the process's group and of all its parents; a container is its own root."""
    found = [groups / "memory.max", groups / "memory" / "memory.limit_in_bytes"]
    lines = own.read_text().splitlines() if own.is_file() else []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        root, file = (groups, "memory.max") if not controllers else (groups / "memory", "memory.limit_in_bytes")
        if not controllers or "memory" in controllers.split(","):
            inside = Path(name.lstrip("/"))
            found += [root / part / file for part in (inside, *inside.parents)]
    return found
