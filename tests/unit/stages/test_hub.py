"""One commit of a Hub model for a whole run."""

import huggingface_hub
import pytest

from minima.errors import StageError
from minima.stages.hub import snapshot


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub whose default branch stands at the commit in `head`."""
    state = {"head": "aaa"}

    def download(name, revision=None, allow_patterns=()):
        if name == "no/such":
            raise OSError("no connection\nand more")
        folder = tmp_path / "cache" / "snapshots" / (revision or state["head"])
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return state


def test_a_run_stays_with_the_commit_that_it_saw_first(hub, tmp_path):
    assert snapshot("org/model", None, tmp_path, keep=True).name == "aaa"
    hub["head"] = "bbb"
    assert snapshot("org/model", None, tmp_path, keep=True).name == "aaa"
    assert snapshot("org/model", "v2", tmp_path, keep=True).name == "v2"
    (tmp_path / "another").mkdir()
    assert snapshot("org/model", None, tmp_path / "another", keep=False).name == "bbb"
    assert not (tmp_path / "another" / "hub.json").exists()


def test_a_model_that_is_not_to_be_had_is_named(hub, tmp_path):
    with pytest.raises(StageError, match=r"'no/such' is neither .* \(no connection\)"):
        snapshot("no/such", None, tmp_path, keep=True)
