"""Open a model's weights by folder: a stage, one of its checkpoints, or a Hugging Face folder."""

from pathlib import Path

from minima.disk_errors import access_refused_named
from minima.engine import distributed
from minima.engine.checkpoint.shards import WEIGHTS, CheckpointSource
from minima.engine.checkpoint.store import verify_together
from minima.errors import CheckpointError, StoreCorrupted
from minima.models import checksums
from minima.models.config_file import check_unquantised
from minima.models.layout import complete_steps, step_folder
from minima.models.weights import FolderSource, WeightSource


def open_weights(folder: Path, step: int | None = None) -> WeightSource:
    """Open the weights in `folder`; those that minima wrote are first checked against their checksums.

    In a process group, every rank must call it.

    Args:
        folder: of a training stage (with `checkpoints/`) or a stage that leaves a `model/`, or a Hugging Face folder.
        step: the checkpoint after this many updates. By default, a finished stage's result (the last step or, with
            patience, the best one), and otherwise the newest complete checkpoint.

    Raises:
        CheckpointError: there is no such checkpoint, or no weights at all, or they are quantised.
        StoreCorrupted: a file of the checkpoint, or of the stage's model, is missing or damaged.
    """
    checkpoints = folder / "checkpoints"
    if checkpoints.is_dir():
        with distributed.refused_together(), access_refused_named():
            result = checksums.result_step(folder) if step is None else None
        # Rank 0's view for all ranks: another node may see an older state of the folder.
        steps, result = distributed.broadcast_object((complete_steps(checkpoints), result))
        if result is not None:
            return _result(folder, result, steps)
        if not steps or (step is not None and step not in steps):
            raise CheckpointError(
                f"no complete checkpoint {'' if step is None else f'after step {step} '}in {checkpoints}",
                "weights are read from complete checkpoints only",
                f"use one of {', '.join(map(str, steps))}" if steps else "train until the first one is written",
            )
        checkpoint = step_folder(checkpoints, step if step is not None else steps[-1])
        verify_together(checkpoint, prefix=WEIGHTS)
        return CheckpointSource(checkpoint)
    if (folder / "metrics.jsonl").is_file() and not (folder / "config.json").is_file():  # a training stage's
        raise CheckpointError(
            f"{checkpoints} no longer exists",
            "the weights of a training stage are in its checkpoints",
            f"put them back, or remove {folder} to train it again",
        )
    if step is not None:
        raise CheckpointError(
            f"{folder} has no checkpoints, so none after step {step}",
            "only a training stage keeps checkpoints by step",
            "remove `@STEP`",
        )
    _verify_together(folder, checksums.WEIGHTS)
    source = FolderSource(folder / "model" if (folder / "model").is_dir() else folder)
    check_unquantised(source.config)
    return source


def _result(folder: Path, step: int, steps: list[int]) -> WeightSource:
    """Open the checkpoint that is a finished training stage's result, and no other."""
    checkpoint = step_folder(folder / "checkpoints", step)
    why = f"it is the result of the finished stage {folder.name}; the checkpoint of another step is another model"
    others = [f"{folder.name}@{other}" for other in steps if other != step]
    named = f"name one that exists ({', '.join(others)}), or " if others else ""
    do = f"restore it, or {named}remove {folder} and everything made from it, to train it again"
    if step not in steps:
        raise CheckpointError(f"{checkpoint} no longer exists", why, do)
    try:
        _verify_together(folder, checksums.RESULT)
        verify_together(checkpoint, prefix=WEIGHTS)
    except StoreCorrupted as error:
        raise StoreCorrupted(error.what, why, do) from None
    return CheckpointSource(checkpoint)


def _verify_together(folder: Path, prefix: str) -> None:
    """Check the files of a stage, each rank its share; an error that one rank finds is raised on all."""
    with distributed.refused_together(), access_refused_named():
        checksums.verify_files(folder, prefix, *distributed.share())
