"""What each rank does around a stage."""

import errno
import os
import sys
import threading
import types
from contextlib import nullcontext

import pytest

from minima.disk import write_json
from minima.errors import AccessRefused, DataError, DiskFull, OutOfMemory, StageError, StoreCorrupted
from minima.launcher import Launch
from minima.models.checksums import missing_files, verify_tokenizer
from minima.recipe.loading import load_recipe, resolved_yaml
from minima.stages import running
from minima.stages.manifest import is_finished, read_manifest

RECIPE = """
name: x
output: out
stages:
  - {name: a, kind: build_data, sources: [{embedded: sotu}], tokenizer: tok, sequence_length: 64}
  - {name: b, kind: build_data, sources: [{embedded: sotu}], tokenizer: a, sequence_length: 64}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MINIMA_DRIVER", raising=False)
    (tmp_path / "x.yaml").write_text(RECIPE)
    return load_recipe(tmp_path / "x.yaml")


@pytest.fixture
def kind(monkeypatch):
    """A stand-in for the stage's own file; its `ran` lists the stages that it ran, by rank."""
    module = types.ModuleType("minima.stages.build_data")
    module.ran, module.error = [], None

    def run(context):
        module.ran.append((context.launch.rank, context.stage.name))
        assert context.folder.is_dir()
        assert not is_finished(context.folder)
        if module.error:
            raise module.error
        return {"blocks": 3}

    module.run = run
    monkeypatch.setitem(sys.modules, "minima.stages.build_data", module)
    return module


def go(recipe, tmp_path, names=None, launch=Launch()):
    said: list[str] = []
    running.run_stage_command(recipe, tmp_path / "x.yaml", names, launch, said.append, False)
    return said


def test_stages_run_in_order_and_publish(recipe, kind, tmp_path):
    said = go(recipe, tmp_path, ["b", "a"])
    assert kind.ran == [(0, "a"), (0, "b")]
    assert said[0] == "== stage a (build_data)"
    assert read_manifest(tmp_path / "out" / "a")["metrics"] == {"blocks": 3}
    assert (tmp_path / "out" / "recipe.yaml").is_file()
    assert go(recipe, tmp_path) == []
    assert len(kind.ran) == 2, "finished stages are skipped"


@pytest.mark.parametrize(("name", "edited"), [("a", "refused"), ("c", "taken")])
def test_what_a_stage_leaves_gets_checksums_and_an_export_may_be_edited(
    recipe, kind, tmp_path, monkeypatch, name, edited
):
    def run(context):
        (context.folder / "model").mkdir()
        (context.folder / "model" / "tokenizer.json").write_text("{}")
        return {}

    kind.run = run
    monkeypatch.setitem(sys.modules, "minima.stages.export", kind)
    monkeypatch.setattr(running, "uses_ranks", lambda stage: False)
    (tmp_path / "x.yaml").write_text(RECIPE + "  - {name: c, kind: export, model: base}\n")
    go(load_recipe(tmp_path / "x.yaml"), tmp_path, [name])
    folder = tmp_path / "out" / name
    verify_tokenizer(folder)
    (folder / "model" / "tokenizer.json").write_text("[]")
    with pytest.raises(StoreCorrupted) if edited == "refused" else nullcontext():
        verify_tokenizer(folder)
    (folder / "model" / "tokenizer.json").unlink()
    assert missing_files(folder) == ["model/tokenizer.json"]


def test_a_failed_stage_publishes_nothing_and_resumes(recipe, kind, tmp_path):
    kind.error = DataError("no text", "nothing to learn from", "give some")
    with pytest.raises(DataError):
        go(recipe, tmp_path)
    assert not is_finished(tmp_path / "out" / "a")
    first = read_manifest(tmp_path / "out" / "a", "started.json")["started"]
    kind.error = None
    go(recipe, tmp_path)
    assert read_manifest(tmp_path / "out" / "a")["started"] == first


def test_other_ranks_wait_for_a_stage_of_one_process(recipe, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "_POLL_SECONDS", 0.01)
    other = threading.Thread(target=go, args=(recipe, tmp_path, None, Launch(1, 2, 1, 2, "h", 1)), daemon=True)
    other.start()
    go(recipe, tmp_path, None, Launch(0, 2, 0, 2, "h", 1))
    other.join(timeout=10)
    assert not other.is_alive()
    assert kind.ran == [(0, "a"), (0, "b")]


def test_a_full_disk_is_named_wherever_it_is_met(recipe, kind, tmp_path, monkeypatch):
    kind.error = OSError(28, "No space left on device")  # of metrics.jsonl, a tokenizer, a writer of somebody else's
    with pytest.raises(DiskFull, match=r"writing out/a \("):
        go(recipe, tmp_path)
    kind.error = DiskFull("inner", "w", "d")
    with pytest.raises(DiskFull, match=r"^inner"):
        go(recipe, tmp_path)
    kind.error = None

    def full(*given):
        raise OSError(28, "No space left on device")

    for name in ("write_manifest", "write_started", "claim_run_folder"):
        with monkeypatch.context() as patch:
            patch.setattr(running, name, full)
            with pytest.raises(DiskFull, match="No space left"):
                go(recipe, tmp_path)
    go(recipe, tmp_path)


def test_somebody_elses_file_is_named_wherever_it_is_met(recipe, kind, tmp_path):
    kind.error = PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "x.yaml"))
    with pytest.raises(AccessRefused, match=r"x\.yaml: Permission denied \(it belongs to .*, "):
        go(recipe, tmp_path)


def test_a_stage_folder_that_cannot_be_made_is_a_mistake_to_mend(recipe, kind, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "recipe.yaml").write_text(resolved_yaml(recipe))
    (tmp_path / "out" / "a").touch()
    with pytest.raises(StageError, match="the folder out/a cannot be used"):
        go(recipe, tmp_path)


class Group:
    """A process group of threads: whoever raises together gathers first."""

    def __init__(self, ranks):
        self.meeting, self.met = threading.Barrier(ranks, timeout=10), []

    def raise_together(self, error):
        self.met.append(error)
        self.meeting.wait()
        for found in self.met:
            if found is not None:
                raise found

    def barrier(self):
        self.meeting.wait()


@pytest.mark.parametrize("refused", [False, True])
def test_rank_0_alone_judges_the_folder_that_it_then_writes_into(recipe, kind, tmp_path, monkeypatch, refused):
    from minima.engine import distributed

    group, judged, ended = Group(2), [], {}
    monkeypatch.setattr(distributed, "raise_together", group.raise_together)
    monkeypatch.setattr(distributed, "barrier", group.barrier)
    monkeypatch.setattr(running, "uses_ranks", lambda stage: True)
    check = running.check_unchanged
    monkeypatch.setattr(running, "check_unchanged", lambda *given: judged.append(given) or check(*given))
    folder = tmp_path / "out" / "a"
    folder.mkdir(parents=True)
    write_json(folder / "started.json", {"identity": "of another try"})
    if refused:
        (folder / "train").touch()

    def rank(number):
        launch = Launch(number, 2, 0, 1, "h", 1)
        context = running.StageContext(recipe, tmp_path / "x.yaml", recipe.stages[0], folder, tmp_path / "out", launch)
        try:
            running._run(kind, context, lambda text: None)
        except StageError as error:
            ended[number] = error.what

    ranks = [threading.Thread(target=rank, args=(number,), daemon=True) for number in range(2)]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join(timeout=20)
        assert not one.is_alive()
    assert len(judged) == 1
    assert is_finished(folder) is not refused
    assert set(ended) == ({0, 1} if refused else set())
    assert all("half-finished" in text for text in ended.values())


def test_a_changed_finished_stage_is_refused_not_skipped(recipe, kind, tmp_path):
    go(recipe, tmp_path)
    changed = load_recipe(tmp_path / "x.yaml", ["stages.a.seed=5"])
    before = (tmp_path / "out" / "recipe.yaml").read_text()
    with pytest.raises(StageError, match="seed is 5 and was 776"):
        go(changed, tmp_path)
    assert (tmp_path / "out" / "recipe.yaml").read_text() == before


def test_two_writers_are_refused_unless_the_driver_holds_the_lock(recipe, kind, tmp_path, monkeypatch):
    from minima.stages.lock import run_lock

    with run_lock(tmp_path / "out"):
        with pytest.raises(StageError, match="in use"):
            go(recipe, tmp_path)
        monkeypatch.setenv("MINIMA_DRIVER", "1")
        go(recipe, tmp_path)
    assert len(kind.ran) == 2


def test_no_memory_left_is_no_error_of_our_own(recipe, kind, tmp_path):
    kind.error = RuntimeError("CUDA error: out of memory")
    with pytest.raises(OutOfMemory, match=r"(?s)stages\.a: CUDA error.*what to do: lower processes"):
        go(recipe, tmp_path)
    assert not is_finished(tmp_path / "out" / "a")


def test_a_stage_that_is_read_has_to_be_what_the_recipe_says_though_it_is_not_chosen(recipe, kind, tmp_path):
    go(recipe, tmp_path, ["a"])
    changed = load_recipe(tmp_path / "x.yaml", ["stages.a.sequence_length=32"])
    kept = (tmp_path / "out" / "recipe.yaml").read_text()
    with pytest.raises(StageError, match="'a' is finished in out/a, but sequence_length is 32 and was 64"):
        go(changed, tmp_path, ["b"])
    assert (tmp_path / "out" / "recipe.yaml").read_text() == kept
    go(recipe, tmp_path, ["b"])
