"""What keeps a rank from joining before it has tried, and what one does that is alone."""

import os
from types import SimpleNamespace

import pytest
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.utils import numa

from minima.engine import distributed
from minima.errors import LauncherError
from minima.launcher import Launch, export_launch


@pytest.mark.parametrize(
    ("name", "usable", "here", "refused"),
    [
        ("cpu", 0, 0, False),
        ("cpu", 0, 8, True),  # a driver that is too old, or a PyTorch for the processor
        ("cuda", 8, 8, False),
        ("cuda", 1, 8, False),  # `srun --gpus-per-task=1`
        ("cuda", 0, 8, True),
        ("cuda", 0, 0, True),  # DS_ACCELERATOR=cuda where there is none
    ],
)
def test_gpus_that_cannot_be_used_are_no_reason_to_take_the_processor(monkeypatch, name, usable, here, refused):
    joined = []
    accelerator = SimpleNamespace(
        device_name=lambda: name,
        device_count=lambda: usable,
        set_device=lambda index: None,
        communication_backend_name=lambda: "nccl",
    )
    monkeypatch.setattr(distributed, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(distributed, "num_accelerators", lambda: here)
    monkeypatch.setattr(distributed, "export_launch", lambda launch: None)
    monkeypatch.setattr(distributed, "_without_shared_memory", lambda: None)
    monkeypatch.setattr(distributed, "_joined", None)
    monkeypatch.setattr(distributed.deepspeed, "init_distributed", lambda **given: joined.append(given["dist_backend"]))
    monkeypatch.setattr(distributed.dist, "new_group", lambda timeout: f"all ranks, {timeout}")
    monkeypatch.setattr(distributed.deepspeed_groups, "_WORLD_GROUP", None)
    if refused:
        with pytest.raises(LauncherError, match=r"(?s)PyTorch \S+ can use none.*minima doctor.*DS_ACCELERATOR=cpu"):
            distributed.start(Launch())
        assert not joined
    else:
        distributed.start(Launch())
        assert joined == ["gloo" if name == "cpu" else "nccl"]
        assert distributed.deepspeed_groups._WORLD_GROUP == "all ranks, 2:00:00"


def test_deepspeed_starts_no_program_at_every_step_to_count_a_machine_s_ranks(monkeypatch):
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]})
    monkeypatch.setattr(numa, "get_numa_cores", lambda: pytest.fail("numactl would run for every bucket of gradients"))
    export_launch(Launch(rank=1, world_size=4, local_rank=1, local_world_size=2))
    assert CPU_Accelerator().device_count() == 2


@pytest.mark.parametrize(("ranks", "waits"), [(1, 0), (2, 1)])
def test_a_lone_rank_waits_for_nobody(monkeypatch, ranks, waits):
    """NCCL would warn that it guesses its device, which DeepSpeed tells it only where there are more."""
    waited = []
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: ranks)
    monkeypatch.setattr(distributed.dist, "barrier", lambda: waited.append(True))
    with distributed.without_other_ranks():  # the others are busy elsewhere
        distributed.barrier()
        assert distributed.gather_objects("mine") == ["mine"]
    assert not waited
    distributed.barrier()
    assert len(waited) == waits
