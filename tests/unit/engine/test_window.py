"""One traversal of the layers for several micro-batches gives the bits that each has alone, in every family."""

import pytest
import torch

from minima.batch import Batch, make_batch
from minima.engine.teacher.window import LayerWindow
from minima.models.causal_lm import hidden_states, load_plain
from minima.models.compiling import decoder_layers
from minima.models.shape import FAMILIES, ModelShape
from minima.models.weights import RandomSource

SLIDING = {
    "mistral": {"sliding_window": 3},  # in all layers
    "qwen2": {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 1},  # in some
    "qwen3": {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 1},
}
KINDS = [(family, {}) for family in FAMILIES] + list(SLIDING.items())


def models(family: str, changes: dict):
    grouped = family not in ("gpt_neox", "gpt2")
    shape = ModelShape(
        family=family, vocabulary_size=61, hidden_size=24, intermediate_size=40, num_layers=3, num_heads=4,
        num_key_value_heads=2 if grouped else 4, max_positions=64,
    )  # fmt: skip
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    source = RandomSource(shape.to_config() | {"initializer_range": 0.2} | ids | changes, seed=1)
    return load_plain(source), load_plain(source)


def micro_batches(number: int, sequences: int, tokens: int, documents: str) -> list[Batch]:
    generator, batches = torch.Generator().manual_seed(0), []
    for index in range(number):
        ids_BT = torch.randint(0, 61, (sequences, tokens), generator=generator)
        documents_BT = torch.zeros_like(ids_BT)
        documents_BT[:, 1 + index :] = 1  # cut elsewhere in each
        has = documents == "all" or (documents == "some" and index % 2)
        batches.append(make_batch(ids_BT, documents_BT=documents_BT if has else None))
    return batches


@pytest.mark.parametrize("documents", ["none", "some", "all"])
@pytest.mark.parametrize(("number", "sequences", "tokens"), [(3, 2, 6), (1, 2, 5), (4, 1, 4), (2, 3, 7)])
@pytest.mark.parametrize(("family", "changes"), KINDS, ids=lambda value: value if isinstance(value, str) else "")
def test_each_micro_batch_is_as_if_alone(family, changes, number, sequences, tokens, documents):
    """Four sequences of four tokens, too: what has as many rows as the window has sequences is told apart."""
    plain, windowed = models(family, changes)
    batches = micro_batches(number, sequences, tokens, documents)
    with torch.no_grad():
        alone = torch.cat([hidden_states(plain, batch) for batch in batches])
        together = LayerWindow(windowed).hidden_states(windowed, batches)
        assert torch.equal(alone, together)
        assert torch.equal(hidden_states(plain, batches[0]), hidden_states(windowed, batches[0])), "and still alone"


def test_a_layer_sees_one_micro_batch_at_a_time():
    _, model = models("llama", {})
    seen = []
    for layer in decoder_layers(model):
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["hidden_states"].shape), with_kwargs=True
        )
    with torch.no_grad():
        LayerWindow(model).hidden_states(model, micro_batches(4, 2, 5, "none"))
    assert seen == [(2, 5, 24)] * 12
