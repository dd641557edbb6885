"""Labels are shifted once, here, and mean what transformers means by them."""

import torch

from minima.batch import IGNORE_INDEX, make_batch
from minima.losses import linear_cross_entropy
from minima.models.causal_lm import head_weight, hidden_states, load_plain
from minima.models.shape import ModelShape
from minima.models.weights import RandomSource


def test_labels_are_the_next_tokens():
    batch = make_batch(torch.tensor([[5, 6, 7], [8, 9, 4]]))
    assert batch.labels_BT.tolist() == [[6, 7, IGNORE_INDEX], [9, 4, IGNORE_INDEX]]


def test_padding_is_neither_learnt_nor_predicted():
    valid = torch.tensor([[True, True, False, False], [False, False, False, False]])
    batch = make_batch(torch.arange(8).view(2, 4), valid)
    assert batch.labels_BT.tolist() == [[1, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX], [IGNORE_INDEX] * 4]


def test_the_loss_is_transformers_own():
    shape = ModelShape(vocabulary_size=50, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2)
    model = load_plain(RandomSource(shape.to_config() | {"initializer_range": 0.2}, seed=3))
    tokens = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(0))
    batch = make_batch(tokens)
    with torch.no_grad():
        wanted = model(tokens, labels=tokens).loss
        hidden = hidden_states(model, batch).flatten(0, 1)
        found = linear_cross_entropy(hidden, head_weight(model), batch.labels_BT.flatten())
    assert found.count == 3 * 8
    torch.testing.assert_close(found.total / found.count, wanted)


def test_documents_have_the_labels_and_positions_that_they_have_alone():
    documents = torch.tensor([[0, 0, 0, 1, 2, 2]])
    batch = make_batch(torch.tensor([[5, 6, 7, 8, 9, 4]]), documents_BT=documents)
    assert batch.labels_BT.tolist() == [[6, 7, IGNORE_INDEX, IGNORE_INDEX, 4, IGNORE_INDEX]]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 0, 0, 1]]


def test_a_batch_moves_with_its_facts():
    batch = make_batch(torch.arange(4).view(1, 4), documents_BT=torch.tensor([[0, 0, 1, 1]]))
    moved = batch._replace(samples=(7,), num_documents=2).to(torch.device("meta"))
    assert moved.documents_BT.is_meta and moved.positions_BT.is_meta and moved.teacher_hidden_BTE is None
    assert moved.samples == (7,) and moved.num_documents == 2
