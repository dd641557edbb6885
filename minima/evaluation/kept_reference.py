"""What a frozen reference gives over whole stores, kept in a file whose name says of what.

Shapes: L blocks of a store, S documents of a block (even).
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minima.data.store import TokenStore
from minima.disk import disk_full_named
from minima.engine import distributed
from minima.engine.reference import HostReference, KeptReference
from minima.engine.teacher.host import FrozenHost
from minima.errors import MinimaError, NotFinite, StageError
from minima.evaluation.held_out import held_out_batch, rank_blocks
from minima.launcher import terminal_columns
from minima.models.weights import tensor_sha256
from minima.report.progress import Progress

FORMAT = "minima-reference-1"
_TENSOR = "log_probs"
logger = logging.getLogger(__name__)


def keep_references(
    folder: Path,
    stores: Sequence[TokenStore],
    build_host: Callable[[], FrozenHost],
    *,
    model: str,
    precision: str,
    micro_batch_sequences: int,
    chunk_tokens: int = 1024,
    name: str = "reference",
) -> list[KeptReference]:
    """A frozen model's log-probabilities of every answer of some stores; every rank calls it.

    What is in the folder is read; what is not there, or is damaged, is made by all ranks together and written.

    Args:
        folder: holds one file for each store, model and precision.
        stores: of preferences.
        build_host: gives the frozen model; called once if something has to be made, and closed here again.
        model: its identity (`models.weights.model_identity`).
        precision: of its weights.
        micro_batch_sequences: blocks of one forward pass on one rank.
        chunk_tokens: tokens whose logits exist at one time.
        name: what progress and errors call it.

    Returns:
        One reference for each store.

    Raises:
        NotFinite: a log-probability is infinite or not a number.
        DiskFull: no space for the file; nothing of it is left.
        StageError: the file cannot be written for another reason; nothing of it is left.
    """
    facts = [
        {"format": FORMAT, "store": store.sha256(), "model": model, "precision": precision, "blocks": len(store)}
        for store in stores
    ]
    paths = [kept_path(folder, fact) for fact in facts]
    kept = [_read_together(path, fact) for path, fact in zip(paths, facts, strict=True)]
    if any(values_LS is None for values_LS in kept):
        host = build_host()
        try:
            reference = HostReference(host, chunk_tokens)
            for number, (store, path, fact) in enumerate(zip(stores, paths, facts, strict=True)):
                if kept[number] is None:
                    kept[number] = values_LS = _measure(reference, store, micro_batch_sequences, name)
                    _write(path, values_LS, fact)
        finally:
            host.close()
    return [KeptReference(values_LS) for values_LS in kept if values_LS is not None]


def kept_path(folder: Path, facts: dict[str, Any]) -> Path:
    """Where the values of a store, a model and a precision lie."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return folder / f"reference-{digest[:32]}.safetensors"


def _measure(reference: HostReference, store: TokenStore, micro_batch_sequences: int, name: str) -> Tensor:
    """Float32 [L, S] on the CPU, the same on every rank; each block is run by one of them."""
    device = reference.host.device
    values_LS = torch.zeros(len(store), _documents_of_a_block(store), dtype=torch.float32, device=device)
    world_size = distributed.world_size()
    turns = -(-len(store) // (micro_batch_sequences * world_size))
    progress = Progress(name, turns, columns=terminal_columns())
    for turn, blocks in enumerate(rank_blocks(len(store), micro_batch_sequences, distributed.rank(), world_size)):
        if turn and turn % max(1, turns // 10) == 0 and distributed.is_main():
            progress.update(turn, {"reference of": f"{len(store):,} blocks"})
        batch = held_out_batch(store, blocks, micro_batch_sequences).to(device)
        found_BS = reference(batch)[: len(blocks)]
        values_LS[blocks.start : blocks.stop, : found_BS.shape[1]] = found_BS
    progress.close()
    values_LS = distributed.all_reduce_sum(values_LS).cpu()  # all other ranks have zeros there, so the sum is exact
    if not values_LS.isfinite().all():
        raise NotFinite(
            f"{name}: the reference gives a log-probability that is not finite in {store.folder}",
            "every loss against it would be not a number",
            "take another reference, or run it with `reference_precision: float32`",
        )
    return values_LS


def _documents_of_a_block(store: TokenStore) -> int:
    """Documents of the block that has most of them, rounded up to pairs."""
    length = store.sequence_length
    starts = store.document_starts()
    inside = starts[starts % length != 0] // length  # a block's own start begins its first document in any case
    most = 1 + (int(np.bincount(inside).max()) if len(inside) else 0)
    return most + most % 2


def _read_together(path: Path, facts: dict[str, Any]) -> Tensor | None:
    """The kept values, if every rank finds the same and they are sound."""
    values_LS, digest, wrong = _read(path, facts)
    found = distributed.gather_objects((digest, wrong))
    said = next((wrong for _, wrong in found if wrong), None)
    if said is not None and distributed.is_main():
        logger.warning("%s %s; it is made again", path, said)
    return values_LS if all(other == found[0] for other in found) else None


def _read(path: Path, facts: dict[str, Any]) -> tuple[Tensor | None, str, str]:
    """Values and their checksum; none of them, and what is wrong, where the file cannot be used."""
    if not path.is_file():
        return None, "", ""
    try:
        with safe_open(path, framework="pt") as file:
            said = json.loads((file.metadata() or {})["reference"])
            values_LS = file.get_tensor(_TENSOR)
        digest = said.pop("sha256")
    except (SafetensorError, OSError, KeyError, ValueError, AttributeError) as error:
        return None, "", f"cannot be read ({error})"
    if said != facts:
        return None, "", f"says that it holds {said}, wanted is {facts}"
    if tensor_sha256(values_LS) != digest:
        return None, "", "is damaged: its values do not have the checksum that was written with them"
    return values_LS, digest, ""


def _write(path: Path, values_LS: Tensor, facts: dict[str, Any]) -> None:
    """Rank 0 writes the file, whole or not at all; every rank calls it."""
    error: MinimaError | None = None
    if distributed.is_main():
        said = json.dumps(facts | {"sha256": tensor_sha256(values_LS)})
        partial = path.with_name(f".{path.name}.partial")
        try:
            with disk_full_named(path.parent):
                path.parent.mkdir(parents=True, exist_ok=True)
                save_file({_TENSOR: values_LS}, partial, metadata={"reference": said})
                os.replace(partial, path)
        except (MinimaError, OSError, SafetensorError) as found:
            with suppress(OSError):  # what forbade the file may forbid this, and the other ranks wait
                partial.unlink(missing_ok=True)
            error = found if isinstance(found, MinimaError) else _cannot_write(path, found)
    distributed.raise_together(error)


def _cannot_write(path: Path, cause: Exception) -> StageError:
    return StageError(
        f"{path} could not be written ({cause})",
        "the reference's values are kept there, and without them it would be run again at every start",
        "make the folder writable (or give the run another output folder), then run the same command again",
    )
