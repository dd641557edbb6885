"""The task names that lm-eval knows, read from its task files: importing it would outlast a dry run. No torch."""

import importlib.util
import re
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib import resources
from pathlib import Path

# `task: name`, and `tag:` or `group:` with a name or a list of them
_NAMES = re.compile(r"""(?m)^(?:- )?["']?(?:task|group|tag)s?["']?: *(\S*) *((?:\n *- +["']?[\w.-]+["']? *$)*)""")
_PATTERN = re.compile(r"[*?\[/]|\.ya?ml$")  # a pattern for several tasks, or a path


def installed_lm_eval() -> Path | None:
    """The folder where lm-eval is installed; None if it is not."""
    found = importlib.util.find_spec("lm_eval")
    return Path(next(iter(found.submodule_search_locations))) if found and found.submodule_search_locations else None


def unknown_tasks(tasks: Sequence[str], folder: Path | None) -> dict[str, list[str]]:
    """Tasks that no task file defines, each with the names that exist.

    Args:
        tasks: as named in the recipe; patterns and paths are left to lm-eval.
        folder: of the user's own task files.

    Returns:
        Empty if lm-eval is not installed.
    """
    harness = installed_lm_eval()
    if harness is None:
        return {}
    folders = [harness / "tasks", *([folder] if folder is not None else [])]
    with resources.as_file(resources.files("minima.assets") / "tasks") as shipped:
        known = frozenset().union(*(_names_in(place) for place in (*folders, shipped)))
    return {task: sorted(known) for task in tasks if task not in known and not _PATTERN.search(task)}


@cache
def _names_in(folder: Path) -> frozenset[str]:
    found: set[str] = set()
    for path in folder.rglob("*"):
        if path.suffix in (".yaml", ".yml", "") and path.is_file():
            with suppress(OSError):  # an unreadable file provides no tasks
                for name, listed in _NAMES.findall(path.read_text(encoding="utf-8", errors="replace")):
                    found |= {name.strip("'\""), *re.findall(r"- +[\"']?([\w.-]+)", listed)}
    return frozenset(found - {""})
