"""The prune stage on two ZeRO-3 ranks measures what one plain process does, and its folder loads."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from minima.batch import make_batch
from minima.data.packing import StoreWriter
from minima.data.sampler import BlockSampler
from minima.data.store import TokenStore
from minima.models.causal_lm import load_plain
from minima.models.shape import ModelShape
from minima.models.weights import FolderSource, RandomSource, model_identity, write_folder
from minima.pruning.importance import Scores, importance
from tests.distributed.ranks import ROOT, await_ranks, start_ranks

pytestmark = pytest.mark.ranks
SHAPES = {
    "llama": ModelShape(
        vocabulary_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_layers=3,
        num_heads=8,
        num_key_value_heads=4,
        tied=True,
    ),
    "gpt2": ModelShape(
        family="gpt2",
        vocabulary_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=4,
        max_positions=32,
        tied=True,
    ),
}
TARGETS = {
    "llama": {"hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "num_layers": 2},
    "gpt2": {"hidden_size": 32, "num_heads": 2, "intermediate_size": 48},
}
SEQUENCES, MICRO, LENGTH = 9, 2, 16  # five micro-batches on two ranks, the last one with one sequence only


def stages() -> list[dict]:
    made = []
    for name, target in TARGETS.items():
        made.append(
            {
                "name": name,
                "kind": "prune",
                "model": f"{name}-model",
                "data": "data",
                "target": target,
                "sequences": SEQUENCES,
                "micro_batch_sequences": MICRO,
                "sequence_length": LENGTH,
                "precision": "float32",
            }
        )
    again = {"name": "again", "scores": "llama", "depth": "importance", "norm_compensation": "rms"}
    made.append(made[0] | again | {"target": {"intermediate_size": 48, "num_layers": 1}})
    made.append(made[0] | {"name": "by-magnitude", "score": "magnitude"})
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prune")
    tokens = np.random.default_rng(0).integers(1, 97, 20 * 24)
    tokens[23::24] = 0
    with StoreWriter(folder / "data" / "train", sequence_length=24, vocabulary_size=97, end_token=0) as writer:
        writer.append(tokens, np.full(20, 24), np.full(20, 50))
        writer.finish()
        writer.publish()
    for name, shape in SHAPES.items():
        # GPT-2's stock dropout, which must not act on scores though layers are checkpointed in training mode
        dropout = {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5} if name == "gpt2" else {}
        source = RandomSource(shape.to_config() | dropout | {"initializer_range": 0.2}, seed=1)
        write_folder(folder / f"{name}-model", source.config, ((key, source.read(key)) for key in source.names()))
    recipe = {"name": "prune", "output": str(folder / "run"), "stages": stages()}
    for stage in recipe["stages"]:
        stage["model"] = str(folder / stage["model"])
        stage["data"] = str(folder / "data")
    (folder / "recipe.json").write_text(json.dumps(recipe))
    await_ranks(start_ranks(["tests.distributed.prune_ranks", str(folder)], folder, ROOT), folder)
    return folder


@pytest.mark.parametrize("name", list(SHAPES))
def test_two_ranks_measure_what_one_plain_process_does(folder, name):
    source = FolderSource(folder / f"{name}-model")
    model = load_plain(source).requires_grad_(False)
    store = TokenStore.open(folder / "data" / "train")
    order = BlockSampler(len(store), 776).indices(0, SEQUENCES)
    rows = torch.from_numpy(store.blocks(order))[:, :LENGTH]
    identity = model_identity(source)
    plain = importance(
        lambda forward, batch: forward(model, batch),
        model,
        [make_batch(rows[start : start + MICRO]) for start in range(0, SEQUENCES, MICRO)],
        SHAPES[name],
        identity=identity,
    )
    ranks = Scores.load(folder / "run" / name / "scores.safetensors", kind="gradient", model=identity)
    assert ranks.batches == plain.batches == 5
    for part in ("head_LK", "neuron_LI", "hidden_D"):
        expected, got = getattr(plain, part), getattr(ranks, part)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)
        assert float((got - expected).mean().abs()) <= 1e-5 * float(expected.mean())


@pytest.mark.parametrize("name", ["llama", "gpt2", "again", "by-magnitude"])
def test_the_folder_loads_and_the_metrics_are_its_own(folder, name):
    own = folder / "run" / name
    metrics = json.loads((own / "metrics.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(own / "model")
    assert sum(parameter.numel() for parameter in model.parameters()) == metrics["parameters"]
    assert ModelShape.from_folder(own / "model").parameters == metrics["parameters"]
    assert model.config.num_hidden_layers == metrics["num_layers"] == len(metrics["kept_layers"])
    assert 0 < metrics["layer_sparsity_percent"] < 100
    if name != "gpt2":
        assert model.config.num_key_value_heads == metrics["num_key_value_heads"]


def test_reused_scores_are_the_same_ones(folder):
    first, again = (folder / "run" / name / "scores.safetensors" for name in ("llama", "again"))
    assert first.read_bytes() == again.read_bytes()
