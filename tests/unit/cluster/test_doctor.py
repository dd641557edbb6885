"""What the doctor finds on one machine, and how it tells what several ranks have found."""

import errno
import os
import shutil
import sys
import threading
import urllib.error
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from minima.cluster import doctor, doctor_machine, doctor_ranks
from minima.cluster.doctor_machine import Finding, check_machine, guarded
from minima.launcher import Launch, free_port

Usage = namedtuple("Usage", "total used free")


def found(folder) -> dict[str, Finding]:
    return {finding.check: finding for finding in check_machine(folder)}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """No Slurm, no MPI and no Hub but what a test brings."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(doctor_machine.shutil, "which", lambda name: None)
    for name in ("SLURM_JOB_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def program(folder, monkeypatch, name, text, code=0):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\necho '{text}'{' >&2' if code else ''}\nexit {code}\n")
    (folder / name).chmod(0o755)
    monkeypatch.undo()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("PATH", f"{folder}:{os.defpath}")
    which = shutil.which
    monkeypatch.setattr(doctor_machine.shutil, "which", lambda program: which(program, path=str(folder)))


# -- one machine -----------------------------------------------------------------------------------------------------


def test_a_sound_machine(tmp_path):
    checks = found(tmp_path)
    assert [name for name, finding in checks.items() if finding.state == "FAILED"] == []
    assert checks["locks"].state == checks["file times"].state == checks["files"].state == checks["Hub"].state == "ok"
    assert "HF_HUB_OFFLINE=1" in checks["Hub"].found
    assert (
        checks["Slurm"].found == "not installed on this machine" and checks["MPI"].found == "no mpirun on this machine"
    )
    assert list(tmp_path.iterdir()) == [], "the doctor leaves nothing behind"


def test_a_folder_that_is_not_there_is_one_finding(tmp_path):
    (tmp_path / "file").touch()
    for name, how in (("none", "none does not exist"), ("file", "file is a file")):
        checks = found(tmp_path / name)
        assert checks["disk"].state == "FAILED" and checks["disk"].found.endswith(how)
        assert "mkdir" in checks["disk"].do and "--folder" in checks["disk"].do
        assert not {"locks", "file times", "files"} & set(checks)


def test_a_misspelt_folder_fails_and_is_not_made(tmp_path, monkeypatch):
    for name in ("join", "check_device", "leave", "hosts"):
        ok = {"join": Finding("ranks", "ok", "one"), "check_device": [], "hosts": []}.get(name)
        monkeypatch.setattr(doctor_ranks, name, (lambda code: code) if name == "leave" else lambda *given, ok=ok: ok)
    monkeypatch.setattr(doctor_ranks, "distributed", Group(1))
    doctor_ranks.distributed.own.rank = 0
    said: list[str] = []
    assert doctor.doctor(tmp_path / "rnus", said.append) == 1
    assert "rnus does not exist" in said[0] and "1 FAILED" in said[0]
    assert list(tmp_path.iterdir()) == []
    assert doctor.doctor(tmp_path, said.append) == 0, said


def test_a_folder_below_one_that_may_not_be_listed(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    assert found(tmp_path)["disk"].state != "FAILED"  # a warning where little is free


@pytest.mark.parametrize(("free_gib", "state"), [(0.5, "FAILED"), (20, "warning"), (500, "ok")])
def test_free_disk(tmp_path, monkeypatch, free_gib, state):
    usage = Usage(2**40, 0, int(free_gib * 2**30))
    monkeypatch.setattr(doctor_machine.shutil, "disk_usage", lambda path: usage)
    finding = found(tmp_path)["disk"]
    assert finding.state == state and f"{free_gib:.1f} GiB free" in finding.found
    assert (finding.do is None) == (state == "ok")


def test_little_shared_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_machine.shutil, "disk_usage", lambda path: Usage(2**26, 0, 2**26))
    finding = found(tmp_path)["/dev/shm"]
    assert finding.state == "warning" and "--shm-size" in finding.do


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def no_locks(file, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(doctor_machine.fcntl, "flock", no_locks)
    assert found(tmp_path)["locks"].state == "warning"
    monkeypatch.setattr(doctor_machine.fcntl, "flock", lambda file, operation: None)
    finding = found(tmp_path)["locks"]
    assert finding.state == "warning" and "does not block a second writer" in finding.found


def test_a_file_system_with_another_clock(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_machine.time, "time", lambda: os.stat(tmp_path).st_mtime - 100)
    finding = found(tmp_path)["file times"]
    assert finding.state == "warning" and "100." in finding.found and "chrony" in finding.do


def test_a_mount_that_is_no_file_system_of_ones_own(tmp_path, monkeypatch):
    """As buckets are mounted: files that do not grow, or that are not yet there under their new name."""
    rename = Path.rename

    def loses_content(path, target):
        moved = rename(path, target)
        (moved / "file").write_text("")
        return moved

    def refuses(path, target):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    for way, said in ((loses_content, "reads ''"), (refuses, "Input/output error")):
        monkeypatch.setattr(Path, "rename", way)
        finding = found(tmp_path)["files"]
        assert finding.state == "FAILED" and said in finding.found and "local disk" in finding.do
        assert list(tmp_path.iterdir()) == []


def test_slurm(tmp_path, monkeypatch):
    program(tmp_path / "bin", monkeypatch, "scontrol", "slurm 23.11.4")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    assert found(tmp_path)["Slurm"] == Finding("Slurm", "ok", "23.11.4, job 7 on n[1-2]")
    program(tmp_path / "bin", monkeypatch, "scontrol", "fatal: no configuration source", 1)
    finding = found(tmp_path)["Slurm"]
    assert (
        finding.state == "warning" and "fatal: no configuration source" in finding.found and "SLURM_CONF" in finding.do
    )


def test_mpi(tmp_path, monkeypatch):
    program(tmp_path / "bin", monkeypatch, "mpirun", "mpirun (Open MPI) 5.0.1")
    versions = {"mpi4py": "4.1.0"}

    def version(name):
        if name not in versions:
            raise doctor_machine.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(doctor_machine.metadata, "version", version)
    assert found(tmp_path)["MPI"] == Finding("MPI", "ok", "Open MPI 5.0.1, mpi4py 4.1.0")
    versions.clear()
    finding = found(tmp_path)["MPI"]
    assert finding.state == "warning" and "without mpi4py" in finding.found and "pip install mpi4py" in finding.do
    program(tmp_path / "bin", monkeypatch, "mpirun", "HYDRA build details")
    assert found(tmp_path)["MPI"].state == "warning"


@pytest.mark.parametrize(("status", "state"), [(200, "ok"), (401, "ok"), (503, "warning")])
def test_the_hub_is_asked_and_no_token_shown(tmp_path, monkeypatch, status, state):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("HF_TOKEN", "hf_nobodynobody")
    finding = found(tmp_path)["Hub"]
    server.shutdown()
    server.server_close()
    assert finding.state == state and "hf_nobody" not in str(finding)
    assert ("a token is set" in finding.found) == (state == "ok")


def test_no_way_to_the_hub_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    finding = found(tmp_path)["Hub"]
    assert finding.state == "warning" and "minima fetch" in finding.do and "refused" in finding.found


def test_a_check_that_breaks_is_a_finding():
    def broken():
        raise urllib.error.URLError("odd")

    finding = guarded("Hub", broken)
    assert finding.state == "FAILED" and "URLError" in finding.found


# -- several ranks ---------------------------------------------------------------------------------------------------

PYTHON = Finding("Python", "ok", "3.11.7, /venv")
HOSTS = ["n1", "n1", "n2", "n2"]
LAUNCH = Launch(0, 4, 0, 2, "n1", 1)


def test_what_all_ranks_found_is_told_once():
    text = doctor._report(LAUNCH, {rank: [PYTHON] for rank in range(4)}, HOSTS)
    assert "4 ranks on 2 machines" in text and text.count("3.11.7") == 1 and "rank 0" not in text
    assert text.endswith("nothing FAILED, 0 warnings") and "what to do" not in text


def test_what_some_ranks_found_is_told_with_their_machines():
    bad = Finding("GPU", "FAILED", "none", "ask for GPUs")
    good = Finding("GPU", "ok", "H100")
    text = doctor._report(LAUNCH, {0: [good], 1: [good], 2: [good], 3: [bad]}, HOSTS)
    assert "H100 (ranks 0, 1 on n1; rank 2 on n2)" in text and "none (rank 3 on n2)" in text
    assert "  GPU: ask for GPUs" in text and text.endswith("1 FAILED, 0 warnings")


def test_machines_with_other_versions_fail():
    other = Finding("Python", "ok", "3.12.1, /venv")
    elsewhere = Finding("Python", "ok", "3.11.7, /another/venv")
    assert doctor._different({0: [PYTHON], 1: [elsewhere]}) == []
    ((finding, _),) = doctor._different({0: [PYTHON], 1: [other]})
    assert finding.state == "FAILED" and finding.found == "3.11.7 and 3.12.1"


def test_a_rank_that_cannot_reach_rank_0_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor_ranks, "_REACH_SECONDS", 0.3)
    finding = doctor_ranks.join(Launch(1, 2, 0, 1, "127.0.0.1", free_port()))
    assert finding.state == "FAILED" and "rank 1 cannot reach rank 0 at 127.0.0.1:" in finding.found
    assert "refused" in finding.found and "MASTER_ADDR" in finding.do
    finding = doctor_ranks.join(Launch(1, 2, 0, 1, "no-such-host.invalid", 1))
    assert finding.state == "FAILED" and "no-such-host.invalid" in finding.found
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (place | {"MASTER_PORT": str(free_port())}).items():
        monkeypatch.setenv(name, value)
    said: list[str] = []
    assert doctor.doctor(tmp_path, said.append) == 1
    assert "rank 1 of 2" in said[0] and "cannot reach" in said[0]


def test_a_machine_without_torch_is_told_and_not_started(monkeypatch, tmp_path):
    def version(name):
        raise doctor_machine.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor_machine.metadata, "version", version)
    said: list[str] = []
    assert doctor.doctor(tmp_path, said.append) == 1
    assert "torch" in said[0] and "not installed" in said[0] and "install minima with its dependencies" in said[0]


@pytest.mark.parametrize(
    ("device", "toolkit", "libaio", "said"),
    [
        ("cpu", None, True, "built on first use"),
        ("cuda", "/usr/local/cuda", True, "built on first use"),
        ("cuda", None, True, "the CUDA toolkit (CUDA_HOME) is missing"),
        ("cuda", "/usr/local/cuda", False, "libaio-dev"),
    ],
)
def test_what_the_op_for_asynchronous_io_would_lack(monkeypatch, device, toolkit, libaio, said):
    builder = type("Builder", (), {"is_compatible": lambda self, verbose: libaio})()
    accelerator = type("Accelerator", (), {"create_op_builder": lambda self, name: builder})()
    monkeypatch.setattr(doctor_ranks, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(doctor_ranks.distributed, "device", lambda: doctor_ranks.torch.device(device))
    monkeypatch.setattr(doctor_ranks.cpp_extension, "CUDA_HOME", toolkit)
    assert said in doctor_ranks._ops().found


@pytest.mark.parametrize(("trouble", "state"), [(None, "ok"), ("RuntimeError: no C compiler", "warning")])
def test_a_gpu_on_which_triton_starts_no_kernel(monkeypatch, trouble, state):
    monkeypatch.setattr(doctor_ranks, "triton_trouble", lambda: trouble)
    monkeypatch.setattr(doctor_ranks, "_gpu", lambda launch: Finding("GPU", "ok", "one"))
    for device, checks in (("cpu", 2), ("cuda", 3)):
        monkeypatch.setattr(doctor_ranks.distributed, "device", lambda device=device: doctor_ranks.torch.device(device))
        findings = doctor_ranks.check_device(Launch())
        assert len(findings) == checks
    assert (findings[-1].check, findings[-1].state) == ("Triton", state)
    assert trouble is None or (trouble in findings[-1].found and "python3-dev" in str(findings[-1].do))


def test_gpus_that_torch_cannot_use(monkeypatch):
    monkeypatch.setattr(doctor_machine, "num_accelerators", lambda: 8)
    torch = sys.modules.get("torch") or __import__("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    finding = {finding.check: finding for finding in doctor_machine.check_programs()}["torch"]
    assert finding.state == "FAILED" and "the 8 GPUs" in finding.found and "DS_ACCELERATOR" in finding.do


class Group:
    """A process group of threads, for what ranks on several machines would do."""

    def __init__(self, ranks):
        self.size, self.own = ranks, threading.local()
        self.meeting, self.values = threading.Barrier(ranks, timeout=30), [None] * ranks

    def is_main(self):
        return self.own.rank == 0

    def barrier(self):
        self.meeting.wait()

    def gather_objects(self, value):
        self.values[self.own.rank] = value
        self.meeting.wait()
        gathered = list(self.values)
        self.meeting.wait()
        return gathered

    def broadcast_object(self, value):
        return self.gather_objects(value)[0]


@pytest.fixture
def group(monkeypatch):
    """Run a check on two ranks of two machines, `n1` and `n2`, each with its own argument; gives rank 0's finding."""
    members = Group(2)
    monkeypatch.setattr(doctor_ranks, "distributed", members)
    monkeypatch.setattr(doctor_ranks, "_hosts", ["n1", "n2"])
    monkeypatch.setattr(doctor_ranks, "NFS_SECONDS", 0.3)

    def run(check, *arguments):
        results = {}

        def rank(number, argument):
            members.own.rank = number
            results[number] = check(argument)

        threads = [threading.Thread(target=rank, args=pair, daemon=True) for pair in enumerate(arguments)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert set(results) == {0, 1}
        return results[0]

    return run


def test_a_folder_that_all_machines_share(group, tmp_path):
    assert group(doctor_ranks._shared, tmp_path, tmp_path).state == "ok"
    assert group(doctor_ranks._locks_across, tmp_path, tmp_path).state == "ok"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_only_one_machine_has(group, tmp_path):
    folders = [tmp_path / "of n1", tmp_path / "of n2"]
    for folder in folders:
        folder.mkdir()
    finding = group(doctor_ranks._shared, *folders)
    assert finding.state == "FAILED" and finding.found == "rank 1 (n2) does not see what rank 0 (n1) writes"
    finding = group(doctor_ranks._locks_across, *folders)
    assert finding.state == "warning" and finding.found == "rank 0's lock has no effect on n2"
    finding = group(doctor_ranks._shared, tmp_path / "none", tmp_path)
    assert finding.state == "FAILED" and "rank 0 cannot write" in finding.found


def test_a_folder_that_rank_0_has_not_is_the_finding_of_its_disk_alone(group, monkeypatch, tmp_path):
    well = Finding("all-reduce", "ok", "right")
    monkeypatch.setattr(doctor_ranks, "_all_reduce", lambda: well)
    monkeypatch.setattr(doctor_ranks, "_own_gpus", lambda: well)
    (tmp_path / "file").touch()
    for folder in ("none", "file"):
        findings = group(lambda path: doctor_ranks.check_together(LAUNCH, path), tmp_path / folder, tmp_path)
        assert [finding.check for finding in findings] == ["all-reduce", "all-reduce", "clocks"]
    findings = group(lambda path: doctor_ranks.check_together(LAUNCH, path), tmp_path, tmp_path)
    assert {finding.check for finding in findings} > {"shared folder", "locks between machines"}


def test_a_folder_that_ranks_may_not_look_at_stops_none_of_them(group, monkeypatch, tmp_path):
    well = Finding("all-reduce", "ok", "right")
    monkeypatch.setattr(doctor_ranks, "_all_reduce", lambda: well)
    monkeypatch.setattr(doctor_ranks, "_own_gpus", lambda: well)
    stat, private = os.stat, tmp_path / "private" / "runs"

    def refuse(path, *arguments, **options):
        if str(path) == str(private):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", refuse)
    findings = group(lambda path: doctor_ranks.check_together(LAUNCH, path), private, private)
    assert [finding.check for finding in findings] == ["all-reduce", "all-reduce", "clocks"]
    findings = group(lambda path: doctor_ranks.check_together(LAUNCH, path), tmp_path, private / "of n2")
    assert findings[2].found == "rank 1 (n2) does not see what rank 0 (n1) writes"


def test_a_folder_that_refuses_every_change_stops_no_rank(group, monkeypatch, tmp_path):
    def refuse(path, *arguments, **options):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(doctor_ranks.Path, "write_text", refuse)
    monkeypatch.setattr(os, "unlink", refuse)
    finding = group(doctor_ranks._shared, tmp_path, tmp_path)
    assert finding.state == "FAILED" and "rank 0 cannot write" in finding.found
    assert group(doctor_ranks._locks_across, tmp_path / "none", tmp_path).check == "locks between machines"


def test_a_clock_that_is_ahead(group, monkeypatch):
    assert group(lambda argument: doctor_ranks._clocks(), None, None).state == "ok"
    clock = doctor_ranks.time.time
    own = doctor_ranks.distributed.own
    monkeypatch.setattr(doctor_ranks.time, "time", lambda: clock() + 90 * own.rank)
    finding = group(lambda argument: doctor_ranks._clocks(), None, None)
    assert finding.state == "warning" and "n2 is 90." in finding.found and "ahead of n1" in finding.found
