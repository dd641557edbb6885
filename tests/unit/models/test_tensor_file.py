"""Tensors are written for whoever may read the folder."""

import errno
import os

import pytest
import torch
from safetensors.torch import load_file

from minima.models.tensor_file import save_tensors


@pytest.fixture
def umask():
    before = os.umask(0o002)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o002, 0o664), (0o022, 0o644), (0o077, 0o600)])
def test_the_umask_decides_who_reads_them(tmp_path, umask, mask, mode):
    umask(mask)
    tensors, path = {"a": torch.arange(3)}, tmp_path / "a.safetensors"
    for _ in range(2):  # also over a file that is there
        save_tensors(tensors, path, metadata={"format": "pt"})
        assert path.stat().st_mode & 0o777 == mode
    assert torch.equal(load_file(path)["a"], tensors["a"])


def test_a_file_system_without_modes_is_no_reason_to_lose_a_checkpoint(tmp_path, umask, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "chmod", refuse)
    save_tensors({"a": torch.arange(3)}, tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors")["a"].tolist() == [0, 1, 2]
