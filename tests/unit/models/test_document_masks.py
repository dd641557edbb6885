"""A packed block with walls is its documents, each alone."""

import pytest
import torch

from minima.batch import make_batch
from minima.losses import linear_cross_entropy
from minima.models.attention import document_mask
from minima.models.causal_lm import head_weight, hidden_states, load_plain
from minima.models.shape import FAMILIES, ModelShape
from minima.models.weights import RandomSource
from tests.fakes import HostReads

SMALL = {"vocabulary_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_layers": 3, "num_heads": 4}
LENGTHS = ((5, 1, 6), (12,), (2, 10))
GENERATOR = torch.Generator().manual_seed(0)
TOKENS_BT = torch.randint(0, 50, (3, 12), generator=GENERATOR)
DOCUMENTS_BT = torch.tensor([[number for number, n in enumerate(row) for _ in range(n)] for row in LENGTHS])


def model_of(family: str, **config):
    settings = ModelShape(family=family, **SMALL).to_config() | {"initializer_range": 0.3} | config
    return load_plain(RandomSource(settings, seed=1))


def loss_of(model, batch):
    hidden_ND = hidden_states(model, batch).flatten(0, 1)
    return linear_cross_entropy(hidden_ND, head_weight(model), batch.labels_BT.flatten())


@pytest.mark.parametrize(
    ("family", "config"),
    [
        *((family, {"sliding_window": None}) for family in FAMILIES),
        ("mistral", {"sliding_window": 3}),
        ("qwen2", {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 1}),
    ],
)
def test_the_loss_of_a_packed_block_is_that_of_its_documents_alone(family, config):
    model = model_of(family, **config)
    packed = loss_of(model, make_batch(TOKENS_BT, documents_BT=DOCUMENTS_BT))
    packed.total.backward()
    gradient = head_weight(model).grad.clone()
    model.zero_grad()
    alone = [
        loss_of(model, make_batch(piece[None]))
        for tokens_T, lengths in zip(TOKENS_BT, LENGTHS, strict=True)
        for piece in tokens_T.split(lengths)
    ]
    sum(loss.total for loss in alone).backward()
    assert packed.count == sum(loss.count for loss in alone) == 36 - 6
    torch.testing.assert_close(packed.total, sum(loss.total for loss in alone))
    torch.testing.assert_close(gradient, head_weight(model).grad, rtol=1e-4, atol=1e-5)
    open_attention = loss_of(model, make_batch(TOKENS_BT))
    assert open_attention.count == 33
    assert abs(open_attention.total / 33 - packed.total / 30) > 1e-3, "without walls it is another loss"


def test_one_bias_serves_all_layers():
    model, batch = model_of("llama"), make_batch(TOKENS_BT, documents_BT=DOCUMENTS_BT)
    kept: set[int] = set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-2:] == (12, 12):
            kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden_states(model, batch)
    assert len(kept) == 1


def test_the_host_is_not_asked():
    model, batch = model_of("llama"), make_batch(TOKENS_BT, documents_BT=DOCUMENTS_BT)
    with HostReads() as reads:
        hidden_states(model, batch).square().sum().backward()
    assert reads.count == 0


def test_a_mask_lets_no_token_see_another_document_or_the_future():
    mask_BTT = document_mask(DOCUMENTS_BT)[:, 0]
    for row, column in ((0, 1), (4, 5), (6, 5), (11, 4)):
        assert not mask_BTT[0, row, column]
    assert mask_BTT[0, 4, 0] and mask_BTT[0, 5, 5] and mask_BTT[0, 11, 6]
    windowed = document_mask(DOCUMENTS_BT, window=2)[:, 0]
    assert windowed[0, 4, 3] and not windowed[0, 4, 2]
    assert windowed.any(-1).all(), "a row without any token would give no number"
