"""Models from the Hub: a run uses the same commit of each from its first stage to its last. No torch."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minima.disk import write_json
from minima.errors import StageError, first_line

COMMITS = "hub.json"
_PATTERNS = ["*.json", "*.model", "*.txt", "*.jinja"]


def snapshot(name: str, revision: str | None, run_folder: Path, *, keep: bool, weights: bool = True) -> Path:
    """The folder of a Hub model on this machine, downloaded if it is not in the cache.

    Branches move, so the commit that a run saw first is recorded in its folder and used by later stages and starts: a
    run is never resumed with another teacher.

    Args:
        revision: branch, tag or commit; None for the default branch.
        run_folder: where the commits are recorded.
        keep: whether this process records them; only rank 0 does.
        weights: whether to include the weights; a tokenizer needs none.

    Raises:
        StageError: there is no such model, or the Hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    path, key = run_folder / COMMITS, _key(name, revision)
    commits = _commits(run_folder)
    lacking = "there are no weights to start from" if weights else "there are no pieces to read"
    with _refusal_named(f"{'model' if weights else 'tokenizer'} {name!r}", lacking):
        patterns = [*_PATTERNS, *(["*.safetensors"] if weights else [])]
        folder = Path(snapshot_download(name, revision=commits.get(key, revision), allow_patterns=patterns))
    if keep and key not in commits:
        # The cache names a snapshot's folder after its commit. Another part may have recorded others meanwhile.
        write_json(path, {key: folder.name} | _commits(run_folder))
    return folder


def check_there(name: str, revision: str | None, run_folder: Path, field: str) -> None:
    """Check that a model's configuration is in the cache or on the Hub; nothing is downloaded.

    Args:
        revision: branch, tag or commit, as in the recipe.
        run_folder: where the commits are recorded.
        field: the recipe's field that names it: `stages.student.teacher`.

    Raises:
        StageError: there is no such model, or the Hub cannot be reached.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    with _refusal_named(f"{field}: {name!r}"):
        wanted = kept_commit(name, revision, run_folder) or revision
        if not isinstance(try_to_load_from_cache(name, "config.json", revision=wanted), str):
            url = hf_hub_url(name, "config.json", revision=wanted)
            try:
                get_hf_file_metadata(url)
            except (HfHubHTTPError, OSError):
                raise
            except Exception as error:  # from the HTTP library of this version of huggingface_hub
                raise ConnectionError(str(error) or type(error).__name__) from error


@contextmanager
def _refusal_named(what: str, lacking: str = "there are no weights to start from") -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise StageError(
            f"{what} was not found: it is not a stage of this recipe, not a folder on this machine, and the Hub did "
            f"not provide it ({first_line(error)})",
            lacking,
            "check the name, give the path of a folder, or download it on a machine with network access",
        ) from error


def kept_commit(name: str, revision: str | None, run_folder: Path) -> str | None:
    """The commit of a Hub model that a run has recorded; None if it has recorded none.

    Args:
        revision: branch, tag or commit, as in the recipe.
        run_folder: where the commits are recorded.
    """
    return _commits(run_folder).get(_key(name, revision))


def _key(name: str, revision: str | None) -> str:
    return f"{name}@{revision or 'default'}"


def _commits(run_folder: Path) -> dict[str, str]:
    path = run_folder / COMMITS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
