"""Quick starts of lm-eval for tests: what asks `tests/lm_eval_server.py`."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

from minima.launcher import cleaned_environment


class LmEvalServer:
    """One process that imports lm-eval, and forks of it that each do what a start would do."""

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("lm_eval_server.py"))],
            env=cleaned_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()  # it keeps nothing, and its own end takes seconds
        self.process.communicate()

    def tee(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> int:
        """What `harness._tee` gives, if the command is lm-eval's program alone."""
        assert list(command[:3]) == [sys.executable, "-m", "lm_eval"], command
        asked = {"arguments": list(command[3:]), "environment": dict(environment), "log": str(log)}
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        code = self.process.stdout.readline()
        assert code, "the server has ended"
        return int(code)

    def instead_of(self, real: Callable, but: str = "") -> Callable:
        """For every call except the one of a name, which is started really."""
        return lambda command, environment, log: (real if log.parent.name == f".{but}.partial" else self.tee)(
            command, environment, log
        )
