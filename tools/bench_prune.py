"""Compares models pruned by minima and by torch-pruning: the same model, the same text, almost the same shape.

    python tools/fetch_smollm2.py
    minima run recipes/smollm2-54m.yaml --stages corpus
    pip install -c constraints.txt torch-pruning         # without it, its rows say so
    python tools/bench_prune.py [--steps 60] [--only minima,torch-pruning:taylor]

Every method keeps two thirds of the heads, neurons and width, and all layers, and reads the same blocks. The table
shows the held-out loss right after pruning and, with `--steps`, after that many steps of distillation from the unpruned
model with the same data, order and settings; seconds for scoring and pruning; and memory beyond the loaded model. Each
method runs in its own process. torch-pruning is used as in its own example for language models
(`examples/LLMs/prune_llm.py`: whole heads, `GroupMagnitudeImportance` with p 2 and means), and with its gradient-based
`GroupTaylorImportance`; it does not prune key-value heads of grouped queries, so its models are larger. `--json` writes
the results to a file.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from minima.batch import Batch
from minima.data.batches import read_batch
from minima.data.sampler import BlockSampler
from minima.data.store import TokenStore
from minima.losses import linear_cross_entropy, linear_distillation_loss
from minima.models.causal_lm import head_weight, hidden_states, load_plain
from minima.models.families import shape_of
from minima.models.weights import FolderSource, MemorySource, WeightSource
from minima.pruning.importance import Scores, importance, magnitude, random
from minima.pruning.selection import select
from minima.pruning.surgery import PrunedSource
from minima.pruning.target import plan_target
from minima.recipe.pruning import PruneTarget

MICRO_BATCH, BATCH = 4, 8
LEARNING_RATE, WARMUP = 6e-4, 0.1


def main() -> None:
    """Run the methods one after another and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/models/smollm2-135m"))
    parser.add_argument(
        "--data", type=Path, default=Path("runs/smollm2-54m/corpus"), help="a build_data stage's folder"
    )
    parser.add_argument("--blocks", type=int, default=32, help="number of blocks to compute scores on")
    parser.add_argument("--steps", type=int, default=0, help=f"of distillation, {BATCH} blocks each")
    parser.add_argument("--only", default=",".join(WAYS), help="methods, separated by commas")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        print(json.dumps(_measure(options)))
        return
    found: dict[str, dict[str, Any]] = {}
    for way in options.only.split(","):
        child = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--way", way], stdout=subprocess.PIPE, text=True
        )
        found[way] = json.loads(child.stdout.splitlines()[-1]) if child.returncode == 0 else {"missing": "failed"}
        print(way, found[way], file=sys.stderr, flush=True)
    columns = ("parameters", "loss", *(["distilled"] if options.steps else []), "seconds", "megabytes")
    print("| way | " + " | ".join(columns) + " |\n|---|" + "---:|" * len(columns))
    for way, facts in found.items():
        cells = [f"{facts[name]:,}" if name in facts else "" for name in columns]
        print(
            f"| {way} | " + (facts["missing"] + " |" * len(columns) if "missing" in facts else " | ".join(cells) + " |")
        )
    if options.json is not None:
        measured = {"model": options.model.name, "blocks": options.blocks, "steps": options.steps, "rows": found}
        options.json.write_text(json.dumps(measured, indent=1) + "\n")


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    source = FolderSource(options.model)
    model = load_plain(source)
    train, held_out = (TokenStore.open(options.data / name) for name in ("train", "held_out"))
    order = BlockSampler(len(train), seed=776).indices(0, options.blocks + options.steps * BATCH)
    scored = [read_batch(train, order[at : at + MICRO_BATCH]) for at in range(0, options.blocks, MICRO_BATCH)]
    before, started = psutil.Process().memory_info().rss, time.monotonic()
    try:
        pruned = WAYS[options.way](source, model, scored)
    except ImportError as error:
        return {"missing": f"not installed: {error.name}"}
    seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    student = load_plain(pruned)
    facts: dict[str, Any] = {
        "parameters": sum(math.prod(pruned.shape(name)) for name in pruned.names()),
        "loss": _loss(student, held_out),
        "seconds": round(seconds, 1),
        "megabytes": round((peak - before) / 1e6),
    }
    if options.steps:
        _distil(student, load_plain(source), train, order[options.blocks :], options.steps)
        facts["distilled"] = _loss(student, held_out)
    return facts


def _loss(model: Any, store: TokenStore) -> float:
    """Loss in nats per token over all blocks."""
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(store), MICRO_BATCH):
            loss = _cross_entropy(model, read_batch(store, np.arange(start, min(start + MICRO_BATCH, len(store)))))
            total, count = total + float(loss.total), count + int(loss.count)
    return round(total / count, 4)


def _cross_entropy(model: Any, batch: Batch) -> Any:
    hidden_ND = hidden_states(model, batch).flatten(0, 1)
    return linear_cross_entropy(hidden_ND, head_weight(model), batch.labels_BT.flatten())


def _distil(student: Any, teacher: Any, store: TokenStore, order: Any, steps: int) -> None:
    """Distil with half text, half teacher, as published; warm-up, then cosine to a tenth; products in bfloat16."""
    optimizer = torch.optim.AdamW(student.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(steps):
        warm, done = max(1, round(WARMUP * steps)), step / steps
        rate = LEARNING_RATE * min(1.0, (step + 1) / warm) * (0.55 + 0.45 * math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        for at in range(0, BATCH, MICRO_BATCH):
            batch = read_batch(store, order[step * BATCH + at : step * BATCH + at + MICRO_BATCH])
            with torch.autocast("cpu", torch.bfloat16):
                with torch.no_grad():
                    teacher_NE = hidden_states(teacher, batch).flatten(0, 1)
                hidden_ND, labels_N = hidden_states(student, batch).flatten(0, 1), batch.labels_BT.flatten()
                loss = linear_distillation_loss(
                    hidden_ND, head_weight(student), teacher_NE, head_weight(teacher), labels_N
                )
            (loss.total / loss.count * MICRO_BATCH / BATCH).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _with_minima(kind: str, norms: str) -> Callable[[WeightSource, Any, list[Batch]], WeightSource]:
    def cut(source: WeightSource, model: Any, batches: list[Batch]) -> WeightSource:
        shape = shape_of(source.config)
        target = PruneTarget(
            hidden_size=shape.hidden_size * 2 // 3,
            num_heads=shape.num_heads * 2 // 3,
            intermediate_size=shape.intermediate_size * 2 // 3,
        )
        if kind == "gradient":
            model.requires_grad_(False)
            scores: Scores = importance(
                lambda forward, batch: forward(model, batch), model, batches, shape, identity=""
            )
        else:
            scores = magnitude(source, shape, identity="") if kind == "magnitude" else random(shape, 776, identity="")
        pruned = PrunedSource(source, select(scores, plan_target(shape, target)), norms)  # type: ignore[arg-type]
        return MemorySource(pruned.config, {name: pruned.read(name) for name in pruned.names()})

    return cut


def _with_torch_pruning(kind: str) -> Callable[[WeightSource, Any, list[Batch]], WeightSource]:
    def cut(source: WeightSource, model: Any, batches: list[Batch]) -> WeightSource:
        import torch_pruning as tp

        warnings.simplefilter("ignore")
        model.config.use_cache = False  # with a cache in the model's output, its tracing does not terminate
        config, heads = model.config, {}
        for layer in model.model.layers:
            attention = layer.self_attn
            heads[attention.q_proj] = config.num_attention_heads
            heads[attention.k_proj] = heads[attention.v_proj] = config.num_key_value_heads
        if kind == "taylor":
            for batch in batches:
                loss = _cross_entropy(model, batch)
                (loss.total / loss.count / len(batches)).backward()
            score: Any = tp.importance.GroupTaylorImportance(group_reduction="mean")
        else:
            score = tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean")
        model.set_attn_implementation("eager")  # its tracing cannot follow grouped queries through a fused kernel
        pruner = tp.pruner.BasePruner(
            model,
            example_inputs=batches[0].input_ids_BT[:1, :16],
            importance=score,
            global_pruning=False,
            output_transform=lambda output: output.logits,
            pruning_ratio=1 / 3,
            ignored_layers=[model.lm_head],
            num_heads=heads,
            prune_num_heads=True,
            prune_head_dims=False,
            head_pruning_ratio=1 / 3,
            round_to=4,
        )
        for group in pruner.step(interactive=True):
            group.prune()
        return _as_source(source.config, model)

    return cut


def _as_source(config: dict[str, Any], model: Any) -> WeightSource:
    """A model whose modules were pruned in place, with a matching configuration."""
    layer, head_size = model.model.layers[0], config["head_dim"]
    tensors: dict[str, Tensor] = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        assert torch.equal(tensors.pop("lm_head.weight"), tensors["model.embed_tokens.weight"])
    return MemorySource(
        config
        | {
            "hidden_size": model.model.embed_tokens.embedding_dim,
            "num_attention_heads": layer.self_attn.q_proj.out_features // head_size,
            "num_key_value_heads": layer.self_attn.k_proj.out_features // head_size,
            "intermediate_size": layer.mlp.gate_proj.out_features,
        },
        tensors,
    )


WAYS: dict[str, Callable[[WeightSource, Any, list[Batch]], WeightSource]] = {
    "minima": _with_minima("gradient", "rms"),
    "minima:as published": _with_minima("gradient", "none"),
    "minima:magnitude": _with_minima("magnitude", "rms"),
    "minima:random": _with_minima("random", "rms"),
    "torch-pruning": _with_torch_pruning("magnitude"),
    "torch-pruning:taylor": _with_torch_pruning("taylor"),
}

if __name__ == "__main__":
    main()
