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
        ([said(9), said(7, host="n7"), said(9)], [], "rank 1 on n7 hangs: no progress for 60 s"),
        ([said(9), said(9), said(9, waiting=False)], [], "rank 2 on n1 hangs"),
        ([said(9), said(8, waiting=False), said(8)], [], "rank 1 on n1, rank 2 on n1 hangs"),
        ([said(9), said(9)], [], "none stands out from the others"),
        ([said(9, waiting=False), said(9, waiting=False)], [], "none stands out from the others"),
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


class Clock:
    """A clock that moves with what is slept; a beat is followed by all of `asleep`, as when the process is stopped."""

    def __init__(self, asleep: list[float]) -> None:
        self.now, self.asleep = 1000.0, asleep

    def wait(self, seconds: float) -> bool:
        if not self.asleep:
            return True
        self.now += seconds + self.asleep.pop(0)
        return False


@pytest.mark.parametrize(
    ("asleep", "ended_after"),
    [
        ([0, 0, 0, 0, 0], [25]),  # 20 s without progress, looked at every 5
        ([0, 600, 0, 0, 0, 0], []),  # suspended: the others may wake later, so all of the time counts anew
        ([0, 600, 0, 0, 0, 0, 0], [635]),  # and they have not
        ([4, 4, 4], [27]),  # a busy machine, but no suspension
    ],
)
def test_time_in_which_this_rank_was_itself_stopped_does_not_count(monkeypatch, asleep, ended_after):
    clock, left = Clock(asleep), []
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(watchdog.distributed, "rank", lambda: 1)
    monkeypatch.setattr(watchdog.distributed, "world_size", lambda: 2)
    watching = Watchdog(20)

    def no_answer(ask):
        raise TimeoutError("rank 0 is still asleep")

    def leave(verdict, wait_seconds):
        left.append(clock.now - 1000)
        clock.asleep.clear()

    monkeypatch.setattr(watching, "_answered", no_answer)
    monkeypatch.setattr(watching, "_leave", leave)
    monkeypatch.setattr(watching._stopped, "wait", clock.wait)
    watching._watch()
    assert left == ended_after


def test_nor_does_it_where_the_others_were_being_asked(monkeypatch):
    clock, left = Clock([0, 0, 0, 0]), []

    class Asking:
        """The question to rank 0's store, in which this rank is stopped, after rank 0 and for an hour."""

        def __init__(self, target, name, daemon):
            pass

        def start(self):
            pass

        def is_alive(self):
            return True

        def join(self, seconds):
            clock.now += 3600

    monkeypatch.setattr(watchdog.threading, "Thread", Asking)
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(watchdog.distributed, "rank", lambda: 1)
    monkeypatch.setattr(watchdog.distributed, "world_size", lambda: 2)
    watching = Watchdog(1800)
    monkeypatch.setattr(watching, "_leave", lambda verdict, wait_seconds: left.append(verdict))
    monkeypatch.setattr(watching._stopped, "wait", clock.wait)
    watching._watch()
    assert not left


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
