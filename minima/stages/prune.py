"""The prune stage: measures importance, selects what to keep, writes the smaller model."""

import logging
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import torch

from minima.batch import Batch
from minima.data.batches import read_batch
from minima.data.sampler import BlockSampler
from minima.data.store import TokenStore
from minima.disk import whole_or_gone
from minima.disk_errors import disk_full_named
from minima.engine import distributed
from minima.engine.deepspeed_config import frozen_config
from minima.engine.teacher.host import FrozenHost
from minima.errors import ShapeError
from minima.launcher import terminal_columns
from minima.models.checksums import SCORES, verify_files
from minima.models.families import family_of, shape_of
from minima.models.shape import ModelShape
from minima.models.weights import model_identity, write_folder
from minima.pruning.importance import Scores, importance, magnitude, random
from minima.pruning.selection import Selection, select
from minima.pruning.surgery import PrunedSource
from minima.pruning.target import TargetPlan, check_depth, check_norm_compensation, plan_target
from minima.recipe.schema import Prune
from minima.report.progress import Progress
from minima.stages.context import StageContext
from minima.stages.export import copy_tokenizer
from minima.stages.memory_plan import log_scoring
from minima.stages.origin import Origin, check_fit, check_format, check_tokens, open_origin, open_store

logger = logging.getLogger(__name__)


def run(context: StageContext) -> dict[str, Any]:
    """Prune the stage's model to its target shape; every rank calls it, rank 0 writes.

    Writes `model/` (Hugging Face layout, with the model's tokenizer) and `scores.safetensors`.

    Returns:
        Parameters before and after, the sparsity reached, counts and indices of what is kept, and seconds of scoring.

    Raises:
        ShapeError: the target cannot be pruned from the model; raised before any data is read.
        UnsupportedFamily: the model's structure is not known.
        StageError: an input is missing, or reused scores are of another kind or model.
        DiskFull: there is no space for the model; what was written of it is removed.
    """
    stage = context.stage
    assert isinstance(stage, Prune)
    origin = open_origin(context, stage.model, stage.seed)
    source = origin.source
    shape = shape_of(source.config)
    plan = plan_target(shape, stage.target, selection=stage.selection)
    check_norm_compensation(shape, stage.norm_compensation)
    check_depth(source.config, plan.student.num_layers)
    for name in source.names():
        family_of(shape.family).locate(name)  # raises for a tensor that could not be pruned

    started = time.monotonic()
    scores = _scores(context, stage, origin, shape)
    seconds = time.monotonic() - started
    if not distributed.is_main():
        return {}
    assert scores is not None
    chosen = select(scores, plan, depth=stage.depth)
    pruned = PrunedSource(source, chosen, stage.norm_compensation)
    folder = context.folder / "model"
    with whole_or_gone(folder):
        write_folder(folder, pruned.config, ((name, pruned.read(name)) for name in pruned.names()))
        tokenizer = origin.tokenizer
        if tokenizer is None and stage.data is not None:
            tokenizer = context.data(stage.data) / "tokenizer"
        if tokenizer is not None:
            copy_tokenizer(tokenizer, folder)
    metrics = _metrics(plan, chosen, pruned, scores) | {"scoring_seconds": round(seconds, 3)}
    logger.info(
        "%s parameters of %s: %d layers, width %d, %d heads, %d neurons; %.1f %% of a layer's weights removed",
        f"{pruned.parameters:,}",
        f"{shape.parameters:,}",
        chosen.student.num_layers,
        chosen.student.hidden_size,
        chosen.student.num_heads,
        chosen.student.intermediate_size,
        metrics["layer_sparsity_percent"],
    )
    return metrics


def _scores(context: StageContext, stage: Prune, origin: Origin, shape: ModelShape) -> Scores | None:
    """The scores, on rank 0, saved before anything is pruned; those of an earlier start of this stage are reused."""
    path, source = context.folder / SCORES, origin.source
    if distributed.broadcast_object(path.is_file()):  # of the same settings and inputs, or this start would be refused
        return Scores.load(path, kind=stage.score, model=model_identity(source)) if distributed.is_main() else None
    scores = _new_scores(context, stage, origin, shape)
    if distributed.is_main():
        assert scores is not None
        with disk_full_named(context.folder):
            scores.save(path.with_suffix(".partial"))
            path.with_suffix(".partial").rename(path)
    return scores


def _new_scores(context: StageContext, stage: Prune, origin: Origin, shape: ModelShape) -> Scores | None:
    fields = type(stage).model_fields  # a run's saved recipe spells out the defaults, so these count as not given
    measuring = ("sequences", "micro_batch_sequences", "sequence_length", "precision", "deepspeed")
    unused = [name for name in measuring if getattr(stage, name) != fields[name].default]
    if unused and (stage.scores is not None or stage.score != "gradient"):
        logger.warning("%s: %s not used: its scores need no data", stage.name, ", ".join(sorted(unused)))
    if stage.score == "gradient" and stage.scores is None:
        return _measure(context, stage, origin, shape)
    if not distributed.is_main():
        return None
    source = origin.source
    identity = model_identity(source)
    if stage.scores is not None:
        folder = context.scores(stage.scores)
        verify_files(folder, SCORES)
        return Scores.load(folder / SCORES, kind=stage.score, model=identity)
    if stage.score == "magnitude":
        return magnitude(source, shape, identity=identity)
    return random(shape, stage.seed, identity=identity)


def _measure(context: StageContext, stage: Prune, origin: Origin, shape: ModelShape) -> Scores:
    assert stage.data is not None
    source, data = origin.source, context.data(stage.data)
    store = open_store(data / "train")
    check_format(store, stage.kind)
    check_fit(shape, store, stage.model.source or "random weights", stage.sequence_length)
    length = stage.sequence_length or store.sequence_length
    if length > store.sequence_length:
        raise ShapeError(
            f"sequence_length {length} from blocks of {store.sequence_length} tokens",
            "a block can be shortened, but not lengthened",
            f"choose at most {store.sequence_length}, or omit it",
        )
    check_tokens(data, origin.tokenizer, origin.identity)
    if stage.sequences > len(store) and distributed.is_main():
        logger.warning(
            "%s: %d sequences are requested, but %s has only %d, so some are read more than once",
            stage.name, stage.sequences, store.folder, len(store),
        )  # fmt: skip
    log_scoring(context, stage, shape, length)
    config = frozen_config(
        context.deepspeed_json(stage.deepspeed),
        precision=stage.precision,
        micro_batch_sequences=stage.micro_batch_sequences,
    )
    with closing(FrozenHost(source, config, precision=stage.precision, activation_checkpointing=True)) as host:
        micro_batches = batches(
            store,
            seed=stage.seed,
            sequences=stage.sequences,
            micro_batch_sequences=stage.micro_batch_sequences,
            sequence_length=length,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            device=host.device,
        )
        return importance(
            host.run,
            host.model,
            _shown(stage, micro_batches),
            shape,
            identity=model_identity(source),
            all_reduce_sum=distributed.all_reduce_sum,
            device=host.device,
        )


def _shown(stage: Prune, micro_batches: Iterator[Batch]) -> Iterator[Batch]:
    """Pass the micro-batches through, reporting progress about ten times."""
    turns = -(-stage.sequences // (stage.micro_batch_sequences * distributed.world_size()))
    progress = Progress(stage.name, turns, columns=terminal_columns())
    for turn, batch in enumerate(micro_batches):
        if turn and turn % max(1, turns // 10) == 0 and distributed.is_main():
            progress.update(turn, {"importance of": f"{turn * stage.micro_batch_sequences:,} sequences per rank"})
        yield batch
    if distributed.is_main():
        progress.close()


def batches(
    store: TokenStore,
    *,
    seed: int,
    sequences: int,
    micro_batch_sequences: int,
    sequence_length: int,
    rank: int,
    world_size: int,
    device: torch.device,
) -> Iterator[Batch]:
    """One rank's micro-batches of the first `sequences` sampled blocks, the last one padded with masked blocks.

    Micro-batch `j` goes to rank `j % world_size`, so the same micro-batches are measured on any number of ranks. All
    ranks get the same number, because ZeRO-3 needs them to work in step; surplus ones have no valid label.
    """
    sampler = BlockSampler(len(store), seed)
    micro_batches = -(-sequences // micro_batch_sequences)
    for turn in range(-(-micro_batches // world_size)):
        first = (turn * world_size + rank) * micro_batch_sequences
        indices = sampler.indices(first, first + micro_batch_sequences)
        valid = np.arange(first, first + micro_batch_sequences) < sequences
        yield read_batch(store, indices, valid, sequence_length=sequence_length).to(device)


def _metrics(plan: TargetPlan, chosen: Selection, pruned: PrunedSource, scores: Scores) -> dict[str, Any]:
    student, source = chosen.student, plan.source
    dense = pruned.parameters_without_padding
    outside = student.embedding_parameters + student.norm_parameters
    return {
        "parameters_before": source.parameters,
        "parameters": pruned.parameters,
        "parameters_without_padding": dense,
        "target_width_percent": plan.width_percent,
        "layer_sparsity_percent": 100 * (1 - (dense - outside) / (student.num_layers * source.layer_parameters)),
        "parameter_sparsity_percent": 100 * (1 - dense / source.parameters),
        "num_layers": student.num_layers,
        "hidden_size": student.hidden_size,
        "num_heads": student.num_heads,
        "num_key_value_heads": student.num_key_value_heads,
        "intermediate_size": student.intermediate_size,
        "kept_layers": chosen.layers.tolist(),
        "kept_groups_by_layer": [len(groups) for groups in chosen.groups],
        "kept_neurons_by_layer": [len(neurons) for neurons in chosen.neurons],
        "scored_micro_batches": scores.batches,
    }
