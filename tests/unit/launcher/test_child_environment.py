"""What the programs that minima starts read: files, and modules."""

import subprocess
import sys

from minima import launcher
from minima.launcher import child_environment, submitting_environment


def test_a_child_reads_files_as_utf_8_unless_it_is_told_otherwise(monkeypatch):
    monkeypatch.delenv("PYTHONUTF8", raising=False)
    assert child_environment(1)["PYTHONUTF8"] == launcher.cleaned_environment()["PYTHONUTF8"] == "1"
    monkeypatch.setenv("PYTHONUTF8", "0")
    assert child_environment(1)["PYTHONUTF8"] == "0"


def test_a_child_imports_from_the_working_directory_only_if_this_process_does(monkeypatch, tmp_path):
    for name in ("PYTHONSAFEPATH", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "yaml.py").write_text("raise SystemExit(3)")

    def code(environment: dict[str, str]) -> int:
        return subprocess.run([sys.executable, "-c", "import yaml"], env=environment).returncode

    assert code(child_environment(1)) == code(launcher.cleaned_environment()) == 0
    assert "PYTHONSAFEPATH" not in submitting_environment(), "a job may run in a container"
    monkeypatch.syspath_prepend(str(tmp_path))
    assert code(child_environment(1)) == 3
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert child_environment(1)["PATH"]
