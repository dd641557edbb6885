"""The benchmark of the distillation step: which rows run when and together, and what a failure or a stop leaves."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.unit.tools.bench_turns import turn
from tools.bench import models, report, running, steps, worker
from tools.bench.losses import Missing
from tools.bench.profiles import PROFILES, Row
from tools.bench.running import largest_that_fits, turn_order

SCRIPT = Path(__file__).parents[3] / "tools" / "bench_distil.py"


def test_turns_alternate():
    first, second, once = Row("a", "minima"), Row("a", "dense"), Row("window", "minima", turns=1)
    assert turn_order((first, second, once)) == [first, second, once, second, first]


def test_rows_of_a_profile_have_names_of_their_own():
    for profile in PROFILES.values():
        names = [row.name for row in profile.rows]
        assert len(set(names)) == len(names), profile.name
        assert all(f"{row.group}:{row.what}" in report.DESCRIPTIONS for row in profile.rows)


def test_the_largest_micro_batch_is_the_last_that_fits():
    tried = []

    def attempt(row: Row) -> dict:
        tried.append(row.micro_batch)
        return {"status": "measured" if row.micro_batch <= 4 else "out of memory"}

    found = largest_that_fits(Row("b", "original", micro_batch=0), (1, 2, 4, 8, 16), attempt)
    assert tried == [1, 2, 4, 8] and found == {"status": "out of memory", "micro_batch": 4}
    assert largest_that_fits(Row("b", "original", micro_batch=0), (8,), attempt)["micro_batch"] == 0


def test_rows_that_share_a_process_group_are_neighbours_of_one_turn():
    a, b = [Row("a", "minima"), Row("a", "dense")], [Row("b", "trl"), Row("b", "liger", turns=1)]
    groups = running.process_groups(turn_order((*a, *b)), ("a",))
    assert groups == [a, [b[0]], [b[1]], [b[0]], a[::-1]]
    twice = running.process_groups(turn_order(tuple(a)), ("a",))
    assert twice == [a, a[::-1]]


def test_rows_that_had_ended_keep_what_they_found_when_a_rank_dies(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, sys\n"
        "task = json.load(open(sys.argv[2]))\n"
        "found = {'ceiling': {}, 'rows': [{'status': 'measured'}]}\n"
        "open(task['result'], 'w').write(json.dumps(found))\n"
        "sys.exit('died')\n"
    )
    rows = [Row("a", "minima"), Row("a", "dense")]
    found = running.start(script, PROFILES["gpu-7b-3b"], rows, tmp_path)
    assert [row["status"] for row in found["rows"]] == ["measured", "failed"]


def test_a_row_that_ends_its_process_group_does_not_cost_the_rows_after_it(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, sys\n"
        "task = json.load(open(sys.argv[2]))\n"
        "found = {'ceiling': {'bfloat16': 1e12} if task['ceiling'] else {}, 'rows': []}\n"
        "for row in task['rows']:\n"
        "    open(task['result'], 'w').write(json.dumps(found))\n"
        "    assert row['what'] != 'trl', 'its library has changed'\n"
        f"    found['rows'].append({turn([1.0])})\n"
        "open(task['result'], 'w').write(json.dumps(found))\n"
    )
    rows = tuple(Row("a", what, "bfloat16") for what in ("minima", "trl", "dense", "liger"))
    run = running.Run(replace(PROFILES["gpu-7b-3b"], rows=rows), script, tmp_path, say=lambda _: None)
    run.run()
    states = {row.what: [found["status"] for found in run.turns[row.name]] for row in rows}
    twice = ["measured", "measured"]
    assert states == {"minima": twice, "trl": ["failed"], "dense": twice, "liger": twice}
    assert run.ceilings == {"bfloat16": [1e12, 1e12]}, "once in each turn"


@pytest.mark.parametrize(
    ("tried", "status", "reason"),
    [
        ({"status": "missing", "reason": "no TRL"}, "missing", "no TRL"),
        ({"status": "failed", "reason": "rank 0 died"}, "failed", "rank 0 died"),
        ({"status": "out of memory", "micro_batch": 0}, "out of memory", "not even 1 sequence fits"),
    ],
)
def test_a_row_of_which_no_size_runs_says_why(monkeypatch, tmp_path, tried, status, reason):
    monkeypatch.setattr(running, "start", lambda *_, **__: {"rows": [tried], "ceiling": {}})
    row = Row("b", "trl", "bfloat16", micro_batch=0)
    profile = replace(PROFILES["gpu-7b-3b"], rows=(row,))
    run = running.Run(profile, SCRIPT, tmp_path, say=lambda _: None)
    run.run()
    found = report.summary(row, run.turns[row.name], profile, {})
    assert (found["status"], found["reason"]) == (status, reason)


def test_a_compiled_row_takes_the_size_that_was_found_for_the_same_one_uncompiled(monkeypatch, tmp_path):
    searched = []

    def start(_script, _profile, rows, _scratch, *, sizes=(), **_):
        searched.extend(row.what for row in rows if sizes)
        fits = [{"status": "measured", "micro_batch": 4} if sizes else turn([1.0], micro_batch=row.micro_batch)
                for row in rows]  # fmt: skip
        return {"rows": fits, "ceiling": {}}

    monkeypatch.setattr(running, "start", start)
    rows = tuple(Row("b", what, "bfloat16", micro_batch=0) for what in ("minima", "minima_compiled"))
    run = running.Run(replace(PROFILES["gpu-7b-3b"], rows=rows), SCRIPT, tmp_path, say=lambda _: None)
    run.run()
    assert searched == ["minima"]
    assert [found["micro_batch"] for found in run.turns[rows[1].name]] == [4, 4]


def test_a_size_that_fits_for_two_steps_and_not_for_more_gives_way_to_a_smaller_one(monkeypatch, tmp_path):
    def start(_script, _profile, rows, _scratch, *, sizes=(), ceiling=False, **_):
        fits = [{"status": "out of memory", "micro_batch": 6}] if sizes else [
            turn([1.0], micro_batch=row.micro_batch) if row.micro_batch <= 3 else {"status": "out of memory"}
            for row in rows
        ]  # fmt: skip
        return {"rows": fits, "ceiling": {"bfloat16": 1e12} if ceiling else {}}

    monkeypatch.setattr(running, "start", start)
    row = Row("b", "trl", "bfloat16", micro_batch=0)
    run = running.Run(replace(PROFILES["gpu-7b-3b"], rows=(row,)), SCRIPT, tmp_path, say=lambda _: None)
    run.run()
    assert [found["micro_batch"] for found in run.turns[row.name]] == [3, 3]
    assert run.ceilings == {"bfloat16": [1e12, 1e12]}, "before the first turn and after the last"


def test_rows_that_had_ended_when_the_run_was_stopped_are_kept(monkeypatch, tmp_path):
    def start(_script, _profile, rows, scratch, **_):
        (scratch / "result.json").write_text(json.dumps({"rows": [turn([1.0])], "ceiling": {}}))
        raise SystemExit(143)

    monkeypatch.setattr(running, "start", start)
    rows = (Row("a", "minima", "bfloat16"), Row("a", "dense", "bfloat16"))
    profile = replace(PROFILES["gpu-7b-3b"], rows=rows)
    run = running.Run(profile, SCRIPT, tmp_path, say=lambda _: None)
    with pytest.raises(SystemExit):
        run.run()
    found = [report.summary(row, run.turns[row.name], profile, {}) for row in rows]
    assert [row["status"] for row in found] == ["measured", "not run"]


class _Step:
    """Fits up to three sequences; more are out of memory, or another error."""

    def __init__(self, error: Exception) -> None:
        self.error, self.sizes = error, []

    def step(self, micro_batches: list[int]) -> float:
        self.sizes += micro_batches
        if micro_batches[0] > 3:
            raise self.error
        return 0.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "status"), [(torch.OutOfMemoryError(), "out of memory"), (RuntimeError("no kernel"), "failed")]
)
def test_the_same_engines_try_every_size_two_steps_each(monkeypatch, error, status):
    built = _Step(error)
    monkeypatch.setattr(steps, "build_step", lambda profile, row: built)
    monkeypatch.setattr(models, "make_batches", lambda profile, row, device, step: [row.micro_batch])
    found = worker._search(PROFILES["host"], Row("b", "trl"), [1, 2, 3, 4, 6])
    assert (found["status"], found["micro_batch"]) == (status, 3)
    assert built.sizes == [1, 1, 2, 2, 3, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_beside_the_timed_ones_costs_a_row_of_one_rank_nothing(monkeypatch, ranks):
    """With several ranks, the others would wait for the one that failed."""
    from minima.engine import distributed

    profile, done = PROFILES["host"], []

    class Step:
        def step(self, micro_batches):
            done.append(micro_batches)
            if len(done) > 1 + profile.steps:
                raise RuntimeError("no operator for a counted step")
            return 1.0

        def close(self):
            done.append("closed")

    monkeypatch.setattr(steps, "build_step", lambda profile, row: Step())
    monkeypatch.setattr(models, "make_batches", lambda *_, **__: [4])
    for name, given in {"world_size": ranks, "device": torch.device("cpu"), "barrier": None}.items():
        monkeypatch.setattr(distributed, name, lambda given=given: given)
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [value])
    if ranks > 1:
        with pytest.raises(RuntimeError, match="no operator"):
            worker._time_row(profile, Row("b", "trl"))
    else:
        found = worker._time_row(profile, Row("b", "trl"))
        assert len(found["seconds"]) == profile.steps
        assert (found["collective_bytes"], found["host_to_device_bytes"]) == (None, None)
    assert done[-1] == "closed"


@pytest.mark.parametrize("kind", [RuntimeError, AssertionError])
def test_a_gpu_that_a_row_left_unusable_costs_no_other_row(monkeypatch, kind):
    def broken(_device):
        raise kind("CUDA error:\nunspecified launch failure")

    monkeypatch.setattr(torch.cuda, "get_device_name", broken)
    row = Row("a", "minima", "bfloat16")
    profile = replace(PROFILES["gpu-7b-3b"], rows=(row,))
    found = report.report(profile, {row.name: [turn([1.0])]}, {})
    assert found["rows"][0]["status"] == "measured"
    assert found["environment"]["gpu"] == "unknown: CUDA error: unspecified launch failure"


def test_a_tool_that_is_missing_is_told_by_the_search(monkeypatch):
    def missing(profile, row):
        raise Missing("no TRL")

    monkeypatch.setattr(steps, "build_step", missing)
    found = worker._guarded(lambda profile, row: worker._search(profile, row, [1]), PROFILES["host"], Row("b", "trl"))
    assert found == {"status": "missing", "reason": "no TRL"}
