"""Loads a cluster file into a validated `Cluster`; errors name the place of each mistake."""

import re
from pathlib import Path

import yaml
from pydantic import ValidationError

from minima.cluster.config import Cluster
from minima.errors import ClusterError
from minima.recipe.overrides import RecipeLoader
from minima.recipe.problems import problem


class _Loader(RecipeLoader):
    """A recipe's YAML, except that `24:00:00` and `0123` are strings: YAML 1.1 would read them as 86400 and 83."""


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in pairs if not pattern.match("24:00:00")]
    + [(tag, re.compile(r"(0|[-+]?[1-9][0-9]*)$")) for tag, pattern in pairs if tag == "tag:yaml.org,2002:int"]
    for letter, pairs in RecipeLoader.yaml_implicit_resolvers.items()
}


def load_cluster(path: Path) -> Cluster:
    """Load the cluster file at `path`.

    Raises:
        ClusterError: it is missing, broken or invalid.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ClusterError(
            f"the cluster file {path} cannot be read ({' '.join(str(error).split())})",
            "it says where jobs go and which resources they get",
            "start from a copy of slurm/cluster.example.yaml",
        ) from None
    if not isinstance(raw, dict):
        raise ClusterError(
            f"{path} contains no keys and values", "it says which resources jobs get", "see slurm/cluster.example.yaml"
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
        else:
            lines.append(f"{place}: {problem(detail, Cluster)}")
    return ClusterError(
        f"{path.name}: " + "\n    ".join(lines),
        "jobs would not run as intended",
        f"fix it in {path}; docs/clusters.md lists every key, slurm/cluster.example.yaml shows most",
    )
