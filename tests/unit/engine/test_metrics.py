"""Metrics survive restarts: one file, one run id, no record of an update that was lost."""

import errno
import json
import os
import sys
from pathlib import Path

import pytest

from minima.engine.metrics import MetricsLog, last_with, records_from_end
from minima.errors import RecipeError


def read_records(path: Path) -> list[dict]:
    """In the file's order."""
    return [record for record, _ in records_from_end(path)][::-1]


def test_a_restart_keeps_what_stands_and_drops_what_was_lost(tmp_path):
    first = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        first.write({"step": step, "loss": 4.0 - step})
    first.close()
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 4, "lo')  # killed while it wrote
    second = MetricsLog(tmp_path, 2)
    second.write({"step": 3, "loss": 0.5})
    second.close()
    assert read_records(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 0.5},
    ]  # fmt: skip
    assert first.run_id == second.run_id and len(first.run_id) == 32


@pytest.mark.parametrize(("left", "lost"), [(None, "1 to 55"), ("", "1 to 55"), ('{"step": 50}\n', "51 to 55")])
def test_a_history_that_was_lost_is_told(tmp_path, caplog, left, lost):
    if left is not None:
        (tmp_path / "metrics.jsonl").write_text(left)
    MetricsLog(tmp_path, 55).close()
    assert f"{tmp_path}/metrics.jsonl: the records of steps {lost} are lost" in caplog.text


@pytest.mark.parametrize("first_step", [0, 3, 4])
def test_a_whole_history_is_no_reason_to_warn(tmp_path, caplog, first_step):
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 5)))
    MetricsLog(tmp_path, first_step).close()
    assert not caplog.text and len(read_records(tmp_path / "metrics.jsonl")) == first_step


def test_what_a_start_removes_is_gone_on_disk_before_the_next_record(tmp_path, monkeypatch):
    path, sizes = tmp_path / "metrics.jsonl", []
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 5)))
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: sizes.append(os.fstat(number).st_size) or fsync(number))
    MetricsLog(tmp_path, 2).close()
    assert sizes[-1] == path.stat().st_size == len('{"step": 1}\n{"step": 2}\n')


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_a_start_changes_no_file_that_a_link_leads_to(tmp_path, link):
    other, path = tmp_path / "a_snapshot", tmp_path / "metrics.jsonl"
    other.write_text('{"step": 5}\n{"step": 6}\n')
    link(path, other)
    MetricsLog(tmp_path, 5).close()
    assert other.read_text() == '{"step": 5}\n{"step": 6}\n'
    assert path.read_text() == '{"step": 5}\n' and not path.is_symlink()


@pytest.mark.parametrize("left", ["\n", "", '\n{"step": 3, "lo'])
def test_a_record_that_lost_its_line_end_is_not_joined_to_the_next_one(tmp_path, left):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}' + left)
    log = MetricsLog(tmp_path, 2)
    log.write({"step": 3})
    log.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_a_new_file_begins_with_its_first_record(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write({"step": 1})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_start_reads_the_end_of_a_long_history_only_and_leaves_the_rest_as_it_is(tmp_path, monkeypatch, caplog):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1 / step}) for step in range(1, 30001)]
    lines[24999:24999] = ['{"step": 24990, "held_out_loss": 2.0}', "\0\0\0"]
    path.write_text("\n".join(lines) + "\n")
    before, inode, read = path.read_bytes(), path.stat().st_ino, []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda line: read.append(line) or loads(line))
    MetricsLog(tmp_path, 29990).close()
    assert len(read) < 20 and path.stat().st_ino == inode
    assert path.read_bytes() == before[: before.index(b'{"step": 29991')]
    assert last_with(path, "held_out_loss") == {"step": 24990, "held_out_loss": 2.0}
    assert last_with(path, "loss", 7) == {"step": 7, "loss": 1 / 7} and last_with(path, "held_out_loss", 7) is None
    caplog.clear()
    assert [record["step"] for record in read_records(path) if "loss" in record] == list(range(1, 29991))
    assert caplog.text.count("skipped a truncated line") == 1


def test_tensorboard_gets_the_same_numbers(tmp_path):
    log = MetricsLog(tmp_path, 0, tensorboard=True)
    log.write({"step": 7, "loss": 1.25, "held_out_loss": None})
    log.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(7, 1.25)]


def test_weights_and_biases_that_is_not_installed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RecipeError, match=r"pip install wandb"):
        MetricsLog(tmp_path, 0, wandb_project="minima")


def test_weights_and_biases_keeps_one_run_over_restarts(tmp_path, monkeypatch):
    class Wandb:
        def __init__(self) -> None:
            self.started, self.logged = [], []

        def init(self, **settings):
            self.started.append(settings)
            return self

        def log(self, numbers, step):
            self.logged.append((step, numbers))

        def finish(self) -> None:
            pass

    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for first_step in (0, 1):
        log = MetricsLog(tmp_path, first_step, wandb_project="p", name="quickstart/student", config={"steps": 2})
        log.write({"step": first_step + 1, "loss": 1.0})
        log.close()
    assert wandb.started[0]["id"] == wandb.started[1]["id"] and wandb.started[0]["resume"] == "allow"
    assert (wandb.started[0]["group"], wandb.started[0]["name"]) == ("quickstart", "quickstart/student")
    assert wandb.logged == [(1, {"loss": 1.0}), (2, {"loss": 1.0})]


def test_weights_and_biases_without_a_key_or_a_network_is_refused_with_the_way_out(tmp_path, monkeypatch):
    class Wandb:
        Error = type("Error", (Exception,), {})

        def init(self, **settings):
            raise self.Error("No API key configured.\nUse `wandb login`")

    monkeypatch.setitem(sys.modules, "wandb", Wandb())
    with pytest.raises(RecipeError, match=r"(?s)cannot be started: No API key configured\.\n.*WANDB_MODE=offline"):
        MetricsLog(tmp_path, 0, wandb_project="minima", name="quickstart/student")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe0123"])
def test_a_damaged_run_id_is_made_anew(tmp_path, content):
    (tmp_path / "run_id").write_bytes(content)
    log = MetricsLog(tmp_path, 0)
    log.close()
    assert len(log.run_id) == 32 and (tmp_path / "run_id").read_text() == log.run_id


def test_a_disk_that_takes_no_record_is_told_with_the_file(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path, 0)

    def refuse(_):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match=f"'{tmp_path}/metrics.jsonl'"):
        log.write({"step": 1})


def test_what_a_power_cut_left_is_no_reason_not_to_go_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 3.0}\n\xff\xfe\n5\nnull\n{"loss": 1}\n\0\0\n{"step": 2}\n')
    assert read_records(path) == [{"step": 1, "loss": 3.0}, {"step": 2}]
    MetricsLog(tmp_path, 1).close()
    assert read_records(path) == [{"step": 1, "loss": 3.0}]
