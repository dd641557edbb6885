"""A cluster file in, a checked `Cluster` out; every mistake named with its place."""

import re
from pathlib import Path

import yaml
from pydantic import ValidationError

from minima.cluster.config import Cluster, Container, Resources
from minima.errors import ClusterError
from minima.recipe.overrides import RecipeLoader, nearest


class _Loader(RecipeLoader):
    """A recipe's YAML, but `24:00:00` and `0123` are texts: YAML 1.1 would make 86400 and 83 of them."""


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in pairs if not pattern.match("24:00:00")]
    + [(tag, re.compile(r"(0|[-+]?[1-9][0-9]*)$")) for tag, pattern in pairs if tag == "tag:yaml.org,2002:int"]
    for letter, pairs in RecipeLoader.yaml_implicit_resolvers.items()
}


def load_cluster(path: Path) -> Cluster:
    """The cluster file at `path`.

    Raises:
        ClusterError: it is missing, broken, or says what cannot be.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ClusterError(
            f"the cluster file {path} cannot be read ({' '.join(str(error).split())})",
            "it says where jobs go and what they ask for",
            "begin with a copy of slurm/cluster.example.yaml",
        ) from None
    if not isinstance(raw, dict):
        raise ClusterError(
            f"{path} holds no keys and values", "it says what jobs ask for", "see slurm/cluster.example.yaml"
        )
    try:
        return Cluster.model_validate(raw)
    except ValidationError as error:
        raise _explain(path, error) from None


def _explain(path: Path, error: ValidationError) -> ClusterError:
    lines = []
    for detail in error.errors(include_url=False):
        place, inner = ".".join(map(str, detail["loc"])), detail.get("ctx", {}).get("error")
        if isinstance(inner, ClusterError):
            if error.error_count() == 1:
                return ClusterError(f"{path.name}: {inner.what}", inner.why, inner.do)
            lines.append(f"{inner.what} ({inner.do})")
        elif detail["type"] == "extra_forbidden":
            first = detail["loc"][0]
            block = Resources if first in ("defaults", "stages") else Container if first == "container" else Cluster
            block = Cluster if len(detail["loc"]) == 1 else block
            known = sorted(block.model_fields)
            close = nearest(str(detail["loc"][-1]), known) or "; known are " + ", ".join(known)
            lines.append(f"{place}: no such key{close}")
        else:
            lines.append(f"{place}: {detail['msg'][:1].lower() + detail['msg'][1:]}, not {detail['input']!r}")
    return ClusterError(
        f"{path.name}: " + "\n    ".join(lines),
        "jobs would not be what was meant",
        f"mend it in {path}; docs/clusters.md lists every key, slurm/cluster.example.yaml shows most",
    )
