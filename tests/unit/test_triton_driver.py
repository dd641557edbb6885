"""Triton builds a module in C before its first kernel, and a machine may lack what that takes."""

import subprocess
import sys
from types import ModuleType

import pytest
import torch

from minima import triton_driver
from minima.errors import MinimaError
from minima.losses import way


class Driver:
    """Triton's, which builds its module when it is first asked for."""

    asked = 0

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    @property
    def active(self):
        self.asked += 1
        if self.error is not None:
            raise self.error
        return self


@pytest.fixture
def driver(monkeypatch):
    """Puts a driver in the place of Triton's."""
    triton_driver.triton_trouble.cache_clear()

    def put(error: Exception | None = None) -> Driver:
        runtime = ModuleType("triton.runtime")
        runtime.driver = Driver(error)
        monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
        monkeypatch.setitem(sys.modules, "triton.runtime", runtime)
        return runtime.driver

    yield put
    triton_driver.triton_trouble.cache_clear()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler."),
        subprocess.CalledProcessError(1, ["gcc", "cuda_utils.c"]),
        AssertionError("libcuda.so cannot found!\nPlease"),
    ],
)
def test_what_triton_lacks_is_said_once(driver, caplog, error):
    asked = driver(error)
    first = triton_driver.triton_trouble()
    assert first is not None and type(error).__name__ in first and "\n" not in first
    assert triton_driver.triton_trouble() == first and asked.asked == 1
    assert [record.getMessage().count("python3-dev") for record in caplog.records] == [1]


def test_a_gpu_where_triton_is_missing_or_sound(driver, caplog, monkeypatch):
    driver()
    assert triton_driver.triton_trouble() is None and not caplog.records
    triton_driver.triton_trouble.cache_clear()
    monkeypatch.setitem(sys.modules, "triton.runtime", None)
    trouble = triton_driver.triton_trouble()
    assert trouble is not None and "ModuleNotFoundError" in trouble


def test_the_losses_do_without_it_but_where_it_is_asked_for(monkeypatch):
    pytest.importorskip("triton")
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for trouble in (None, "no C compiler"):
        monkeypatch.setattr(way, "triton_trouble", lambda trouble=trouble: trouble)
        assert way.Way(8, "auto").is_fused(gpu, truncated=False) is (trouble is None)
        for kernel, device, truncated in (("auto", cpu, False), ("auto", gpu, True), ("eager", gpu, False)):
            assert way.Way(8, kernel).is_fused(device, truncated) is False
        asked = way.Way(8, "triton")
        monkeypatch.setattr("minima.losses.triton_kernels.interpreted", lambda: False)
        assert asked.is_fused(gpu, truncated=False) is True
        if trouble is None:
            asked.check(gpu)
        else:
            with pytest.raises(MinimaError, match="no C compiler"):
                asked.check(gpu)
