"""Push an exported folder to the Hub: only the files of a model, checked first, in one commit. No DeepSpeed.

A new repository is private. huggingface_hub handles the token (`HF_TOKEN`, or `hf auth login`), which is never shown.
Pushing the same files again makes no commit. Model files of an earlier push that this model no longer has (for example
from another number of shards) are removed in the same commit; other files stay.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import minima
from minima.errors import MinimaError, StageError
from minima.models.checksums import WEIGHTS, verify_files
from minima.stages.release.hub_files import (
    PUSHED_MODEL_FILES,
    check_files,
    check_nothing_lost,
    current_card,
    locate,
    matches,
)

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Pushed:
    """The result of a push."""

    url: str  # of the repository
    commit: str  # the branch's current commit
    changed: bool  # False if the Hub already had the same files, so that no commit was made
    private: bool  # whether the repository is private
    files: list[str]  # names of the pushed files
    removed: list[str]  # files of an earlier push that this model does not have
    left_out: list[str]  # files in the folder that are not part of a model

    def lines(self) -> list[str]:
        """The lines to show to the user."""
        done = f"pushed {len(self.files)} files" if self.changed else "nothing to push: the Hub has the same files"
        found = [f"left out, not part of a model: {', '.join(self.left_out)}"] if self.left_out else []
        found += [f"removed, not part of this model: {', '.join(self.removed)}"] if self.removed else []
        who = "private" if self.private else "public"
        return [*found, f"{done}; {self.url} ({who}) is at commit {self.commit}"]


def publish(
    folder: Path,
    repo: str,
    *,
    private: bool = True,
    revision: str | None = None,
    message: str | None = None,
    endpoint: str | None = None,
) -> Pushed:
    """Check an exported folder, update its card, and push it.

    Args:
        folder: an export stage's, or its `model/`, or any model folder that has a README.md.
        repo: `organisation/name`.
        private: whether a new repository is private; an existing one is left as it is.
        revision: branch, created if missing; None for the default branch.
        message: of the commit.
        endpoint: of the Hub; None for huggingface_hub's default.

    Raises:
        CheckpointError: the weights cannot be read.
        StoreCorrupted: they differ from what the export stage wrote.
        StageError: the folder is not a finished export, a file of it no longer exists, or the Hub refuses it. No file
            is pushed then; a repository created for it stays, and the message says so.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    model, stage = locate(folder)
    if stage is not None:
        verify_files(stage, WEIGHTS)
        check_nothing_lost(stage, model)
    files, left_out = check_files(model)
    content: dict[str, Path | bytes] = {name: model / name for name in files}
    content["README.md"] = current_card(model / "README.md", stage).encode("utf-8")
    message = message or f"{(stage or model).name}, exported by minima {minima.__version__}"
    token = _token_for(repo, revision)
    api = HfApi(endpoint=endpoint, token=token, library_name="minima", library_version=minima.__version__)
    with _refusals(repo, revision, token):
        url, created = _repository(api, repo, private)
    with _refusals(repo, revision, token, created):
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        before = api.model_info(repo, revision=revision)
        there = [sibling.rfilename for sibling in before.siblings or []]
        removed = [name for name in there if matches(name, PUSHED_MODEL_FILES) and name not in content]
        added = [CommitOperationAdd(name, file) for name, file in content.items()]
        # Otherwise the library would silently skip files named by a .gitignore in the repository.
        api.preupload_lfs_files(repo, added, revision=revision, gitignore_content="", free_memory=False)
        operations: list[Any] = [*added, *(CommitOperationDelete(name) for name in removed)]
        commit = api.create_commit(repo, operations, commit_message=message, revision=revision)
    changed = commit.oid != before.sha
    return Pushed(url, commit.oid, changed, bool(before.private), sorted(content), removed, left_out)


def _token_for(repo: str, revision: str | None) -> str:
    """The user's token for the Hub, after a check of the repository's name."""
    from huggingface_hub import get_token

    if not _REPO.fullmatch(repo):
        raise StageError(
            f"{repo!r} is not a repository name", "the Hub needs to know who owns it", "write organisation/name"
        )
    with _refusals(repo, revision, None):
        token = get_token()
    if token is None:
        raise StageError(
            "there is no token for the Hub",
            "it accepts files only from users who are logged in",
            "log in with `hf auth login`, or set HF_TOKEN",
        )
    return token


def _repository(api: "HfApi", repo: str, private: bool) -> tuple[str, bool]:
    """The repository's URL, and whether this call created it."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return str(api.create_repo(repo, private=private, repo_type="model")), True
    except HfHubHTTPError:  # it exists, or may not be created; a second call with exist_ok distinguishes the two
        return str(api.create_repo(repo, private=private, exist_ok=True, repo_type="model")), False


@contextmanager
def _refusals(repo: str, revision: str | None, token: str | None, created: bool = False) -> Iterator[None]:
    """Turn errors of the Hub or the network into a `StageError` that says what to do and does not show the token.

    Args:
        token: the secret to hide.
        created: whether the repository was newly created, and so stays there without the files.
    """
    try:
        yield
    except MinimaError:
        raise
    except Exception as error:  # the libraries below (HTTP, LFS, Xet) have their own classes, and may quote headers
        status = getattr(getattr(error, "response", None), "status_code", None)
        text = str(error) if token is None else str(error).replace(token, "***")
        what, why, do = _told(status, " ".join(text.split())[:400], repo, revision, type(error).__name__)
        if created:
            why += f"; the new repository {repo} stays on the Hub, empty, until it is pushed to or deleted"
        raise StageError(what, why, do) from None


def _told(status: int | None, text: str, repo: str, revision: str | None, kind: str) -> tuple[str, str, str]:
    where = repo if revision is None else f"{repo}, branch {revision}"
    if status == 401:
        return (
            f"the Hub does not recognise the token used for {where} ({text})",
            "nothing was pushed",
            "log in again with `hf auth login`, or set HF_TOKEN to a token that is still valid",
        )
    if status == 403:
        return (
            f"the Hub does not let this token write to {where} ({text})",
            "nothing was pushed",
            f"use a token with write permission from a member of {repo.partition('/')[0]}, or push to another name",
        )
    if status == 404:
        return (
            f"the Hub has no model repository {where} that this token may see ({text})",
            "nothing was pushed; the name may be taken by a dataset or a Space, or by another user's private model",
            "choose another name, or use a token of its owner",
        )
    if status is not None:
        return (
            f"the Hub refused {where} with status {status} ({text})",
            "nothing was pushed",
            "do what it says; if it names no reason, try again later",
        )
    return (
        f"{where} could not be pushed: {kind}: {text}",
        "files reach a branch in a single commit at the end, so the branch is unchanged",
        "check the network (is HF_HUB_OFFLINE set?) and run the same command again; no file is uploaded twice",
    )
