"""Which rank the watchdog names, from what the ranks said last. Real ranks that hang: distributed/test_faults.py."""

import runpy
import threading

import pytest

from minima.engine import watchdog
from minima.engine.watchdog import Watchdog, _verdict


def said(progress: int, waiting: bool = True, **more) -> dict:
    facts = {"progress": progress, "waiting": waiting, "host": "n1", "place": f"place {progress}", "at": "f.py:1 (g)"}
    return facts | {"stack": "  File f.py\n"} | more


@pytest.mark.parametrize(
    ("ranks", "silent", "named"),
    [
        ([said(9), said(9), said(9, host="n2")], [2], "rank 2 on n2 gave no sign of life"),
        ([said(9), {}, said(9)], [1], "rank 1 gave no sign of life"),
        ([said(9), said(7, host="n7"), said(9)], [], "rank 1 on n7 hangs: nothing has moved for 60 s"),
        ([said(9), said(9), said(9, waiting=False)], [], "rank 2 on n1 hangs"),
        ([said(9), said(8, waiting=False), said(8)], [], "rank 1 on n1, rank 2 on n1 hangs"),
        ([said(9), said(9)], [], "none can be told from the others"),
        ([said(9, waiting=False), said(9, waiting=False)], [], "none can be told from the others"),
    ],
)
def test_the_one_that_is_silent_or_behind_or_not_waiting(ranks, silent, named):
    assert named in _verdict(ranks, silent, 60)


def test_a_store_that_cannot_be_reached_costs_the_watchdog_and_not_the_run(monkeypatch, caplog):
    def refuse(prefix, timeout_seconds):
        raise RuntimeError("refused")

    monkeypatch.setattr(watchdog.distributed, "open_store", refuse)
    with Watchdog(5) as watching:
        watching.mark("step 1")
    assert "no watchdog" in caplog.text


def test_none_where_none_is_asked_for(monkeypatch):
    monkeypatch.setattr(watchdog.distributed, "open_store", None)
    threads = threading.active_count()
    with Watchdog(0) as watching:
        watching.mark("step 1")
        assert threading.active_count() == threads


def test_a_hook_that_waits_in_a_thread_of_autograd_is_seen(tmp_path):
    """As on a GPU, where the main thread stands in `backward` and other threads run the hooks."""
    path = tmp_path / "deepspeed" / "runtime" / "zero" / "stage3.py"
    path.parent.mkdir(parents=True)
    path.write_text("def wait(event, begun):\n    begun.set()\n    event.wait()\n")
    scope = runpy.run_path(str(path))
    done, begun, watching = threading.Event(), threading.Event(), Watchdog(0)
    assert not watching._waits()
    for name, seen in (("watchdog store", False), ("pt_autograd_0", True)):
        thread = threading.Thread(target=scope["wait"], args=(done, begun), name=name)
        thread.start()
        begun.wait()
        assert watching._waits() == seen
        done.set()
        thread.join()
        done.clear()
        begun.clear()
