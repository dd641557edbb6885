"""A worker of a study: it makes ordinary runs one after another in one process, so that torch starts only once.

    python -m minima.law.study.worker STUDY.yaml [key.path=value ...]     reads names of runs, one per line, from stdin

Its messages to the driver are lines that begin with `EVENT`; everything else is the run's own log.
"""

import importlib
import logging
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path

from minima.disk_errors import disk_full_named
from minima.errors import MinimaError, Stopped
from minima.launcher import Launch, read_launch
from minima.law.study.grid import Unit, expand
from minima.law.study.recipe import load_study
from minima.stages.driver.summary import write_summary
from minima.stages.lock import run_lock
from minima.stages.running import run_stages

EVENT = "== run "
READY, BEGUN, DONE = "ready", "begun", "done"
USER_ERROR, OWN_ERROR = 2, 1


def main(arguments: list[str]) -> int:
    """Make the runs whose names come on standard input; exit codes are those of `minima stage`."""
    path = Path(arguments[0])
    study = load_study(path, arguments[1:])
    units = {unit.name: unit for unit in expand(study, path)}
    return make(units, path, (line.strip() for line in sys.stdin))


def make(units: dict[str, Unit], path: Path, names: Iterable[str]) -> int:
    """Make runs in this process, on one rank, until one fails or a signal ends it.

    Returns:
        0; 2 after a user's mistake, 1 after one of our own, 128 plus the signal's number after a signal.
    """
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    logging.getLogger("minima").setLevel(logging.INFO)
    try:
        launch = read_launch()
        _start(launch)
        _tell(READY)
        for name in names:
            _tell(BEGUN, name)
            began = time.monotonic()
            make_one(units[name], path, launch)
            _tell(DONE, name, f"{time.monotonic() - began:.3f}")
    except Stopped as stopped:
        _write(str(stopped))
        return 128 + stopped.signal
    except MinimaError as error:
        _write(f"minima: {type(error).__name__}: {error}")
        return USER_ERROR
    except Exception:
        _write(f"an error in minima itself, not in the study:\n{traceback.format_exc()}")
        return OWN_ERROR
    return 0


def _start(launch: Launch) -> None:
    """Load what every run would otherwise wait for: torch, DeepSpeed and the process group of one rank."""
    from minima.engine import distributed

    for kind in ("adapt", "prune", "distil", "evaluate"):
        importlib.import_module(f"minima.stages.{kind}")
    distributed.start(launch)


def make_one(unit: Unit, path: Path, launch: Launch) -> None:
    """Make one ordinary run under its folder's lock: finished stages are skipped, half-finished ones resume."""
    _forget_the_last_run()
    with disk_full_named(unit.folder), run_lock(unit.folder):
        run_stages(unit.recipe, path, unit.recipe.stages, launch, _write, keep_group=True)
        write_summary(unit.recipe, unit.folder)


def _forget_the_last_run() -> None:
    """Restore default signal handling, which training replaces until the process ends, for the next run's start.

    Raises:
        Stopped: a signal came after the last run had trained.
    """
    from minima.engine.signals import StopRequest

    request = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    if isinstance(request, StopRequest):
        if request.requested:
            raise Stopped(request.signal, "every run that was begun")
        request.leave()


def _tell(*words: str) -> None:
    _write(EVENT + " ".join(words))


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
