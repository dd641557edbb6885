"""A build of DeepSpeed's op that was killed must not hold up every later process group."""

import os
import time

import pytest

from minima.engine import distributed


@pytest.mark.parametrize(("age_seconds", "kept", "said"), [(3600, False, "removed"), (5, True, "is waited for")])
def test_an_old_lock_is_removed_and_a_young_one_named(tmp_path, monkeypatch, caplog, age_seconds, kept, said):
    monkeypatch.setattr(distributed, "_get_build_directory", lambda name, verbose: str(tmp_path))
    lock = tmp_path / "lock"
    lock.touch()
    os.utime(lock, (time.time() - age_seconds,) * 2)
    distributed._look_at_lock("some_op")
    assert lock.exists() is kept
    assert said in caplog.text


def test_without_a_lock_nothing_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(distributed, "_get_build_directory", lambda name, verbose: str(tmp_path))
    distributed._look_at_lock("some_op")
    assert not caplog.text
