"""Fixed bits without filling memory that is written anyway."""

import pytest
import torch

from minima.engine.determinism import fix_bits


@pytest.fixture(autouse=True)
def as_before():
    filled = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled


def test_new_memory_is_not_filled():
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1000).isnan().all(), "what PyTorch does by itself"
    fix_bits()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
