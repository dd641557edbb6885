"""Names in indexes and manifests stay in their folder; what the operating system refuses is told as what it is."""

import errno
import hashlib
import json
import os
import platform
import socket
import ssl
from pathlib import Path

import pytest
from safetensors import SafetensorError

from minima import disk
from minima.data.store import TokenStore
from minima.disk import copy_content, file_sha256, inside, json_sha256, own_temporary_folder, sync, write_json
from minima.disk_errors import access_refused_named, file_errors_named, file_named
from minima.engine.checkpoint.store import verify_checkpoint
from minima.errors import AccessRefused, FileFailed, MinimaError, StoreCorrupted
from minima.models.layout import MARKER
from minima.models.shape import ModelShape
from minima.models.weights import FolderSource

OUTSIDE = ["../secret", "/etc/hostname", "a/../../secret", "..", "", None, 3, "a\0b"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leads_out_is_refused(tmp_path, name):
    with pytest.raises(StoreCorrupted, match="names the file"):
        inside(tmp_path, name)


@pytest.mark.parametrize("name", ["a", "a/b", "a..b", "step-1.partial"])
def test_a_name_that_stays(tmp_path, name):
    assert inside(tmp_path, name) == tmp_path / name


def test_a_token_store_reads_nothing_outside(tmp_path):
    (tmp_path / "secret").write_bytes(b"ab")
    folder = tmp_path / "store"
    folder.mkdir()
    shard = {
        "file": "../secret",
        "bytes": 2,
        "tokens": 1,
        "sha256": "",
        "starts": {"file": "s", "bytes": 0, "sha256": ""},
    }
    index = {"format": "minima-tokens-1", "sequence_length": 1, "vocabulary_size": 2, "end_token": 0, "tokens": 1,
             "documents": 0, "bytes": 1, "dtype": "<u2", "shards": [shard]}  # fmt: skip
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(StoreCorrupted, match=r"\.\./secret"):
        TokenStore.open(folder)


def test_a_checkpoint_reads_nothing_outside(tmp_path):
    (tmp_path / MARKER).write_text(json.dumps({"format": "minima-checkpoint-1", "sha256": {"../secret": "0"}}))
    with pytest.raises(StoreCorrupted, match=r"\.\./secret"):
        verify_checkpoint(tmp_path)


def test_a_model_folder_reads_nothing_outside(tmp_path):
    shape = ModelShape(vocabulary_size=8, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1)
    (tmp_path / "config.json").write_text(json.dumps(shape.to_config()))
    weights = {"weight_map": {"model.embed_tokens.weight": "../secret.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(weights))
    with pytest.raises(StoreCorrupted, match=r"\.\./secret"):
        FolderSource(tmp_path)


def refused(number, path):
    raise OSError(number, os.strerror(number), path)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_refusal_says_whose_the_file_is_and_who_asks(tmp_path, monkeypatch, number):
    (tmp_path / "weights").touch(mode=0o600)
    monkeypatch.setattr("minima.disk.os.geteuid", lambda: 2**31 - 5)  # of no name, as in a container
    with pytest.raises(AccessRefused) as said, access_refused_named():
        refused(number, str(tmp_path / "weights"))
    assert said.value.what.startswith(f"{tmp_path}/weights: {os.strerror(number)} (it belongs to ")
    assert said.value.what.endswith(", -rw-------; this process runs as user 2147483643)")


def test_where_nothing_is_to_be_seen_the_folder_above_is_named(tmp_path):
    with pytest.raises(AccessRefused, match=f"denied \\({tmp_path} belongs to "), access_refused_named():
        refused(errno.EACCES, os.fsencode(tmp_path / "gone" / "weights"))


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "no", "a"), OSError(errno.EACCES, "a socket's")])
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)), access_refused_named():
        raise error


@pytest.mark.parametrize(
    ("error", "do"),
    [
        (OSError(errno.EIO, "Input/output error"), "dmesg"),
        (OSError(errno.ESTALE, "Stale file handle"), "put back"),
        (FileNotFoundError(errno.ENOENT, "No such file", "runs/a"), "put back"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a", None, "b"), "move away"),
        (SafetensorError("I/O error: Input/output error (os error 5)"), "dmesg"),
    ],
)
def test_what_else_the_system_refuses_of_a_file_is_named(error, do):
    with pytest.raises(FileFailed) as said, file_errors_named():
        raise error
    assert said.value.what == str(error) and do in said.value.do


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "full", "a"), OSError),
        (OSError(errno.ECONNREFUSED, "a server's"), OSError),
        (OSError("a library's own words"), OSError),
        (FileNotFoundError(errno.ENOENT, "No such file", "ninja"), OSError),
        (ssl.SSLSyscallError(5, "EOF occurred in violation of protocol"), OSError),
        (socket.herror(2, "Host name lookup failure"), OSError),
        (TypeError("ours"), TypeError),
        (StoreCorrupted("a (os error 5)", "b", "c"), StoreCorrupted),
        (OSError(errno.EACCES, "Permission denied", "a"), AccessRefused),
    ],
)
def test_no_other_error_is_called_a_files(error, kind):
    with pytest.raises(kind) as said, file_errors_named():
        raise error
    assert not isinstance(said.value, FileFailed)


def test_a_read_only_folder_is_copied_as_one_that_can_be_written(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "inside").mkdir(parents=True)
    (source / "a").write_text("1")
    (source / "inside" / "b").write_text("2")
    (source / "a").chmod(0o444)
    (source / "inside").chmod(0o555)
    for _ in range(2):
        copy_content(source, target)
    assert (target / "a").read_text() == "1" and (target / "inside" / "b").read_text() == "2"
    fresh = tmp_path / "fresh"
    fresh.touch()
    assert (target / "a").stat().st_mode == fresh.stat().st_mode
    assert (target / "inside").stat().st_mode & 0o200


def test_copying_asks_for_no_change_of_mode_or_time(tmp_path, monkeypatch):
    """Only a file's owner may change them, and the target's files may be somebody else's."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a").touch()
    for name in ("chmod", "utime"):
        monkeypatch.setattr(os, name, lambda *_, **__: refused(errno.EPERM, "a"))
    copy_content(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target" / "a").is_file()


def test_a_file_system_that_syncs_no_folders_is_no_reason_to_stop(tmp_path, monkeypatch):
    (tmp_path / "a").touch()
    sync(tmp_path)
    sync(tmp_path / "a")
    monkeypatch.setattr(os, "fsync", lambda _: refused(errno.EINVAL, None))
    sync(tmp_path)
    with pytest.raises(OSError, match="Invalid"):  # a file's bytes may be lost
        sync(tmp_path / "a")
    monkeypatch.setattr(os, "fsync", lambda _: refused(errno.EIO, None))
    with pytest.raises(OSError, match="Input/output"):
        sync(tmp_path)


def test_a_folder_that_is_not_there_is_not_copied_as_an_empty_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        copy_content(tmp_path / "none", tmp_path / "target")


def test_the_home_of_somebody_who_is_not_here():
    with pytest.raises(MinimaError, match="the home folder it stands for is unknown"), access_refused_named():
        Path("~nobody-of-this-name/x").expanduser()
    with pytest.raises(RuntimeError, match="another"), access_refused_named():
        raise RuntimeError("another")


def test_what_cannot_be_written_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1} and os.listdir(tmp_path) == ["a.json"]


def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("untouched")
    (tmp_path / f".a.json.{platform.node()}.{os.getpid()}").symlink_to(mine)
    with pytest.raises(FileFailed, match=r"Too many levels of symbolic links: .*\.a\.json"), file_errors_named():
        write_json(tmp_path / "a.json", {})
    assert mine.read_text() == "untouched"


@pytest.mark.parametrize("taken", ["link", "writable", "file", "stranger"])
def test_a_temporary_folder_that_others_can_fill_is_not_used(tmp_path, monkeypatch, taken):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = own_temporary_folder("caches")
    assert own_temporary_folder("caches") == folder == tmp_path / "caches"
    assert folder.stat().st_mode & 0o777 == 0o700
    if taken == "writable":
        folder.chmod(0o777)
    elif taken == "stranger":
        monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    else:
        folder.rmdir()
        folder.symlink_to(tmp_path) if taken == "link" else folder.touch()
    other = own_temporary_folder("caches")
    assert other != folder and other.is_dir() and other.stat().st_mode & 0o777 == 0o700


def test_the_checksum_that_files_carry_of_their_json_stays_what_it_is():
    content = {"b": [1, 2.5, None, True], "a": {"é": "\n", "c": "x"}}
    assert json_sha256(content) == "660e7ae3e244d38d290b0d258057ab066685e50afcd15df591f9df8dbb89ded8"
    assert json_sha256({"a": {"c": "x", "é": "\n"}, "b": [1, 2.5, None, True]}) == json_sha256(content)


def test_a_read_that_fails_says_of_which_file(tmp_path, monkeypatch):
    """The system names a file only at its opening."""
    (tmp_path / "a").touch()
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: refused(errno.EIO, None))
    with pytest.raises(OSError, match=f"Input/output error: '{tmp_path}/a'"):
        file_sha256(tmp_path / "a")
    monkeypatch.setattr(os, "fsync", lambda _: refused(errno.EIO, None))
    for work in (sync, lambda path: write_json(path, {})):
        with pytest.raises(OSError, match=f"Input/output error: '{tmp_path}/a'"):
            work(tmp_path / "a")
    with pytest.raises(OSError, match=r"^not the system's$"), file_named(tmp_path):
        raise OSError("not the system's")


@pytest.mark.parametrize(
    ("soft", "hard", "set_to"),
    [(1024, 4096, 4096), (1024, 2**20, 2**16), (1024, -1, 2**16), (-1, -1, None), (4096, 4096, None)],
)
def test_a_process_may_open_as_many_files_as_the_system_lets_it(monkeypatch, soft, hard, set_to):
    """Linux gives a process 1,024 at first; connections among hundreds of ranks or the files of a merge are more."""
    found = []
    monkeypatch.setattr(disk.resource, "getrlimit", lambda which: (soft, hard))
    monkeypatch.setattr(disk.resource, "setrlimit", lambda which, limits: found.append(limits))
    disk.raise_file_limit()
    assert found == ([] if set_to is None else [(set_to, hard)])
