"""A frozen reference's log-probabilities over whole stores, cached in files named by a hash of what they depend on.

Shapes: L blocks of a store, C of them that are reduced over the ranks at once, S documents of a block (even).
"""

import json
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minima.data.store import TokenStore
from minima.disk import json_sha256
from minima.disk_errors import disk_full_named
from minima.engine import distributed
from minima.engine.reference import HostReference, KeptReference
from minima.engine.teacher.host import FrozenHost
from minima.errors import MinimaError, NotFinite, StageError
from minima.evaluation.held_out import held_out_batch, rank_blocks
from minima.launcher import terminal_columns
from minima.models.tensor_file import save_tensors
from minima.models.weights import tensor_sha256
from minima.report.progress import Progress

FORMAT = "minima-reference-1"
_TENSOR = "log_probs"
_VALUES_AT_ONCE = 1 << 22  # at most 16 MB of float32 on the device, whatever the store's size
_BLOCKS_AT_ONCE = 1 << 16  # number of blocks whose documents are counted at once
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
    limits: Sequence[int | None] | None = None,
    name: str = "reference",
) -> list[KeptReference]:
    """A frozen model's log-probabilities of every answer in some stores; every rank calls it.

    Cached values are read from the folder; missing or damaged ones are computed by all ranks together and written. A
    file that covers more blocks than needed is used too.

    Args:
        folder: holds one file per store, model, precision and number of blocks.
        stores: of preferences.
        build_host: builds the frozen model; called at most once, if something must be computed. It is closed here.
        model: its identity (`models.weights.model_identity`).
        micro_batch_sequences: blocks per forward pass on one rank.
        chunk_tokens: number of tokens whose logits exist at one time.
        limits: for each store, the number of its first blocks that are needed; None for all blocks, or for no limits.

    Returns:
        One reference per store.

    Raises:
        NotFinite: a log-probability is infinite or NaN.
        DiskFull: there is no space for the file; no partial file is left.
        StageError: the file cannot be written for another reason; no partial file is left.
    """
    wanted = [
        (store, _facts(store, limit, model, precision))
        for store, limit in zip(stores, limits or [None] * len(stores), strict=True)
    ]
    kept = [_find_together(folder, facts) for _, facts in wanted]
    if any(values_LS is None for values_LS in kept):
        with closing(build_host()) as host:
            reference = HostReference(host, chunk_tokens)
            for number, (store, facts) in enumerate(wanted):
                if kept[number] is None:
                    kept[number] = values_LS = _measure(reference, store, facts["blocks"], micro_batch_sequences, name)
                    _write(kept_path(folder, facts), values_LS, facts)
    return [KeptReference(values_LS) for values_LS in kept if values_LS is not None]


def kept_path(folder: Path, facts: dict[str, Any]) -> Path:
    """The path of the values for a store's first blocks, a model and a precision."""
    return folder / f"{_stem(facts)}{facts['blocks']}.safetensors"


def _facts(store: TokenStore, limit: int | None, model: str, precision: str) -> dict[str, Any]:
    blocks = len(store) if limit is None else min(limit, len(store))
    return {"format": FORMAT, "store": store.sha256(), "model": model, "precision": precision, "blocks": blocks}


def _stem(facts: dict[str, Any]) -> str:
    """The part of the file name that does not depend on the number of blocks."""
    others = {key: value for key, value in facts.items() if key != "blocks"}
    return f"reference-{json_sha256(others)[:32]}-"


def _measure(
    reference: HostReference, store: TokenStore, num_blocks: int, micro_batch_sequences: int, name: str
) -> Tensor:
    """Float32 [L, S] on the CPU, the same on every rank; each block is computed by one rank."""
    device, documents = reference.host.device, _documents_of_a_block(store, num_blocks)
    values_LS = torch.zeros(num_blocks, documents, dtype=torch.float32)
    world_size = distributed.world_size()
    turn_blocks = micro_batch_sequences * world_size
    turns_at_once = max(1, _VALUES_AT_ONCE // (turn_blocks * documents))
    turns = -(-num_blocks // turn_blocks)
    plan = enumerate(rank_blocks(num_blocks, micro_batch_sequences, distributed.rank(), world_size))
    with closing(Progress(name, turns, columns=terminal_columns())) as progress:
        for first in range(0, num_blocks, turns_at_once * turn_blocks):
            rows = min(turns_at_once * turn_blocks, num_blocks - first)
            part_CS = torch.zeros(rows, documents, dtype=torch.float32, device=device)
            for turn, blocks in islice(plan, turns_at_once):
                if turn and turn % max(1, turns // 10) == 0 and distributed.is_main():
                    progress.update(turn, {"reference of": f"{num_blocks:,} blocks"})
                batch = held_out_batch(store, blocks, micro_batch_sequences).to(device)
                found_BS = reference(batch)[: len(blocks)]
                part_CS[blocks.start - first : blocks.stop - first, : found_BS.shape[1]] = found_BS
            part_CS = distributed.all_reduce_sum(part_CS)  # each value is nonzero on one rank only, so sums are exact
            if not part_CS.isfinite().all():
                raise NotFinite(
                    f"{name}: the reference gives a log-probability that is not finite in {store.folder}",
                    "every loss that uses it would not be finite either",
                    "use another reference, or run it with `reference_precision: float32`",
                )
            values_LS[first : first + rows] = part_CS.cpu()
    return values_LS


def _documents_of_a_block(store: TokenStore, num_blocks: int) -> int:
    """The largest number of documents in one of the first `num_blocks` blocks, rounded up to pairs."""
    length, most = store.sequence_length, 1
    for first in range(0, num_blocks, _BLOCKS_AT_ONCE):
        starts = store.document_starts(first, min(first + _BLOCKS_AT_ONCE, num_blocks)) - first * length
        inside = starts[starts % length != 0] // length  # each block's start begins a document, so it is not counted
        most = max(most, 1 + int(np.bincount(inside, minlength=1).max()))
    return most + most % 2


def _find_together(folder: Path, facts: dict[str, Any]) -> Tensor | None:
    """The cached values of the needed blocks, from the smallest valid file that covers them; None if there is none.

    Every rank tries the same files.
    """
    blocks, stem = facts["blocks"], _stem(facts)
    numbers = [path.stem.removeprefix(stem) for path in folder.glob(f"{stem}*.safetensors")]
    found = sorted(int(number) for number in numbers if number.isdigit() and int(number) >= blocks)
    for number in distributed.broadcast_object(found):
        larger = facts | {"blocks": number}
        values_LS = _read_together(kept_path(folder, larger), larger)
        if values_LS is not None:
            return values_LS if number == blocks else values_LS[:blocks].clone()
    return None


def _read_together(path: Path, facts: dict[str, Any]) -> Tensor | None:
    """The cached values, provided that they are valid and the same on every rank."""
    values_LS, digest, wrong = _read(path, facts)
    found = distributed.gather_objects((digest, wrong))
    said = next((wrong for _, wrong in found if wrong), None)
    if said is not None and distributed.is_main():
        logger.warning("%s %s; it is not used", path, said)
    return values_LS if all(other == found[0] for other in found) else None


def _read(path: Path, facts: dict[str, Any]) -> tuple[Tensor | None, str, str]:
    """Values, their checksum and an empty string; if the file cannot be used, the last says why."""
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
        return None, "", f"is for {said}, but {facts} is needed"
    if tensor_sha256(values_LS) != digest:
        return None, "", "is damaged: its values do not match the checksum stored with them"
    return values_LS, digest, ""


def _write(path: Path, values_LS: Tensor, facts: dict[str, Any]) -> None:
    """Write the file atomically on rank 0; every rank calls it."""
    with distributed.refused_together():
        if not distributed.is_main():
            return
        said = json.dumps(facts | {"sha256": tensor_sha256(values_LS)})
        partial = path.with_name(f".{path.name}.partial")
        try:
            with disk_full_named(path.parent):
                path.parent.mkdir(parents=True, exist_ok=True)
                save_tensors({_TENSOR: values_LS}, partial, metadata={"reference": said})
                os.replace(partial, path)
        except (MinimaError, OSError, SafetensorError) as found:
            with suppress(OSError):  # this may fail for the same reason, and must not keep the other ranks waiting
                partial.unlink(missing_ok=True)
            raise found if isinstance(found, MinimaError) else _cannot_write(path, found) from found


def _cannot_write(path: Path, cause: Exception) -> StageError:
    return StageError(
        f"{path} could not be written ({cause})",
        "it caches the reference's values, and without it the reference would run again at every start",
        "make the folder writable (or give the run another output folder), then run the same command again",
    )
