"""One commit of a Hub model for a whole run."""

import json

import huggingface_hub
import pytest

from minima.errors import StageError
from minima.stages.hub import check_there, snapshot


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
    with pytest.raises(StageError, match=r"'no/such' was not found: .* \(no connection\)"):
        snapshot("no/such", None, tmp_path, keep=True)


def test_a_mistyped_model_is_found_before_anything_runs(monkeypatch, tmp_path):
    """And the Hub is asked for nothing that is in its cache: a node without a network would wait for it in vain."""
    asked, cached = [], {"org/cached"}

    def metadata(url):
        asked.append(url.split("/", 3)[3])
        if "no/such" in url:
            raise OSError("no connection\nand more")

    def found(name, file, revision=None):
        return "a path" if name in cached else None

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", found)
    check_there("org/cached", None, tmp_path, "stages.a.model")
    check_there("org/model", "v2", tmp_path, "stages.a.model")
    assert asked == ["org/model/resolve/v2/config.json"]
    with pytest.raises(StageError, match=r"stages.a.model: 'no/such' was not found: .* \(no connection\)"):
        check_there("no/such", None, tmp_path, "stages.a.model")
    monkeypatch.undo()
    with pytest.raises(StageError, match="three/part/name"):
        check_there("three/part/name", None, tmp_path, "stages.a.model")


def test_what_another_part_has_kept_meanwhile_stays(hub, monkeypatch, tmp_path):
    download = huggingface_hub.snapshot_download

    def slow(name, **options):
        (tmp_path / "hub.json").write_text('{"org/other@default": "ccc"}')
        return download(name, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", slow)
    snapshot("org/model", None, tmp_path, keep=True)
    assert json.loads((tmp_path / "hub.json").read_text()) == {"org/model@default": "aaa", "org/other@default": "ccc"}
