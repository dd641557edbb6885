"""Whatever holds a model, opened by its folder: a stage, one of its checkpoints, or a Hugging Face folder."""

from pathlib import Path

from minima.disk import access_refused_named
from minima.engine import distributed
from minima.engine.checkpoint.shards import WEIGHTS, CheckpointSource
from minima.engine.checkpoint.store import verify_together
from minima.errors import CheckpointError
from minima.models import checksums
from minima.models.layout import complete_steps, step_folder
from minima.models.weights import FolderSource, WeightSource


def open_weights(folder: Path, step: int | None = None) -> WeightSource:
    """The weights in `folder`; those that minima wrote are compared with their checksums first.

    Where there is a process group, every rank has to call it.

    Args:
        folder: of a training stage (`checkpoints/`), of a stage that leaves a `model/`, or in Hugging Face's layout.
        step: the checkpoint after so many updates; the newest complete one when not given.

    Raises:
        CheckpointError: there is no such checkpoint, or no weights at all.
        StoreCorrupted: a file of the checkpoint, or of the stage's model, is missing or damaged.
    """
    checkpoints = folder / "checkpoints"
    if checkpoints.is_dir():
        # One view for all ranks: what another node sees may be older.
        steps = distributed.broadcast_object(complete_steps(checkpoints))
        if not steps or (step is not None and step not in steps):
            raise CheckpointError(
                f"no complete checkpoint {'' if step is None else f'after step {step} '}in {checkpoints}",
                "weights are read from complete checkpoints only",
                f"take one of {', '.join(map(str, steps))}" if steps else "train on until the first one is written",
            )
        checkpoint = step_folder(checkpoints, step if step is not None else steps[-1])
        verify_together(checkpoint, prefix=WEIGHTS)
        return CheckpointSource(checkpoint)
    if (folder / "metrics.jsonl").is_file() and not (folder / "config.json").is_file():  # a training stage's
        raise CheckpointError(
            f"{checkpoints} is not there any more",
            "the weights of a training stage are in its checkpoints",
            f"put them back, or remove {folder} to train it again",
        )
    if step is not None:
        raise CheckpointError(
            f"{folder} has no checkpoints, so none after step {step}",
            "only a training stage keeps checkpoints by step",
            "leave `@STEP` away",
        )
    _verify_together(folder)
    return FolderSource(folder / "model" if (folder / "model").is_dir() else folder)


def _verify_together(folder: Path) -> None:
    """Every rank reads its share of what a stage has left; what one finds, all raise."""
    with distributed.refused_together(), access_refused_named():
        checksums.verify_files(folder, checksums.WEIGHTS, *distributed.share())
