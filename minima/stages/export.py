"""The export stage: a trained model as a folder that plain transformers loads, checked before it is published."""

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from minima.data.tokenizer import ends_added, load_tokenizer, misread_as
from minima.disk import write_json
from minima.disk_errors import disk_full_named
from minima.engine import distributed
from minima.engine.deepspeed_config import frozen_config
from minima.engine.teacher.host import FrozenHost
from minima.engine.weights import open_weights
from minima.errors import CheckpointError, DataError, DiskFull, NotFinite
from minima.evaluation.same_logits import check_same_logits, host_logits, plain_logits, probe_batch
from minima.models.layout import TOKENIZER_FILES, has_chat_template
from minima.models.legacy_config import tokenizer_with_4x_names
from minima.models.stock import DTYPES
from minima.models.weights import FolderSource, WeightSource, tensor_sha256, write_folder
from minima.recipe.references import trained_precision
from minima.recipe.schema import Export
from minima.report.cards import model_card
from minima.stages.context import ResolvedModel, StageContext
from minima.stages.evaluate import count_parameters
from minima.stages.host_memory import host_memory_bytes
from minima.stages.release.card_facts import gather_card, taught_to_chat
from minima.stages.release.generation_settings import generation_settings

_HOST_SHARE = 0.5  # plain transformers loads the model too, if it needs at most this share of the host's memory
logger = logging.getLogger(__name__)


def run(context: StageContext) -> dict[str, Any]:
    """Write, check and publish `model/`; every rank calls it, rank 0 writes.

    Returns:
        `parameters`, `bytes` and `files` of the weights, `dtype`, `max_logit_difference` (largest over the checks that
        were made) and `checked_by`.

    Raises:
        CheckpointError: the written folder differs from the trained model; it stays in `model.partial`.
        DiskFull: no space is left; what was published before is intact.
        NotFinite: a tensor is not finite in the output dtype; names it.
    """
    stage = context.stage
    assert isinstance(stage, Export)
    model = context.model(stage.model)
    source = open_weights(model.folder, model.step)
    dtype = DTYPES[stage.dtype or trained_dtype(context, source)]
    partial, final = context.folder / "model.partial", context.folder / "model"
    chat = taught_to_chat(context, stage.model)
    distributed.on_main(lambda: _write(partial, source, model, dtype, stage.shard_bytes, chat))
    differences = _compare_logits(context, stage, source, partial, dtype)

    def publish() -> dict[str, Any]:
        metrics = _metrics(partial, source, dtype, differences)
        misread = misread_as(partial) if model.tokenizer is not None else None
        if misread is not None:
            logger.warning(
                "%s: AutoTokenizer uses %s for a %s, contrary to its tokenizer.json, so other programs would feed "
                "it the wrong tokens; the model card names the class to load it with (PreTrainedTokenizerFast)",
                stage.name, misread, source.config["model_type"],
            )  # fmt: skip
        card = gather_card(context, source.config, metrics, has_chat_template(partial), misread)
        (partial / "README.md").write_text(model_card(card), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)  # left by a start that ended between the rename and the manifest
        partial.rename(final)
        logger.info("exported %s parameters to %s", f"{metrics['parameters']:,}", final)
        return metrics

    return distributed.on_main(publish)


def trained_dtype(context: StageContext, source: WeightSource) -> str:
    """The precision of the stage that trained the model, or the stored dtype of a model not trained in this run."""
    assert isinstance(context.stage, Export)
    precision = trained_precision(context.recipe, context.stage.model)
    return precision or str(source.read(source.names()[-1]).dtype).removeprefix("torch.")


class Cast:
    """A weight source that rounds its values to the output dtype."""

    def __init__(self, source: WeightSource, dtype: torch.dtype) -> None:
        self.config, self._source, self._dtype = source.config, source, dtype

    def names(self) -> list[str]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def read(self, name: str) -> Tensor:
        return self._source.read(name).to(self._dtype)

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        return self._source.read_flat(name, start, stop).to(self._dtype)


def _write(
    partial: Path, source: WeightSource, model: ResolvedModel, dtype: torch.dtype, shard_bytes: int, chat: bool
) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    trained: dict[str, str] = {}

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name in source.names():
            read = source.read(name)
            tensor = read.to(dtype)
            if not torch.isfinite(tensor).all():
                raise _not_finite(name, read, dtype)
            trained[name] = tensor_sha256(tensor)
            yield name, tensor

    config = dict(source.config)
    generation = generation_settings(config, model.tokenizer, chat=chat)
    for name in ("bos_token_id", "eos_token_id"):
        if config.get(name) is None and name in generation:
            config[name] = generation[name]
    try:
        with disk_full_named(partial):
            written = write_folder(partial, config, stream(), dtype=dtype, shard_bytes=shard_bytes)
            check_hashes(trained, written, partial)
            write_json(partial / "generation_config.json", generation)
            if model.tokenizer is not None:
                copy_tokenizer(model.tokenizer, partial)
    except (DiskFull, NotFinite):  # half a model is useless and would keep a full disk full
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _not_finite(name: str, tensor: Tensor, dtype: torch.dtype) -> NotFinite:
    short = str(dtype).removeprefix("torch.")
    if torch.isfinite(tensor).all():
        return NotFinite(
            f"tensor {name} has values up to {tensor.abs().max().item():.4g}, but the maximum of {short} is "
            f"{torch.finfo(dtype).max:.5g}",
            "they would be written as infinity, and the model would be useless",
            "set `dtype: float32`" if short == "bfloat16" else "set `dtype: bfloat16` or `dtype: float32`",
        )
    return NotFinite(
        f"tensor {name} has values that are infinite or NaN",
        "the model is useless",
        "find the step at which its training metrics went wrong, and export an earlier checkpoint: `model: STAGE@STEP`",
    )


def check_hashes(trained: dict[str, str], written: dict[str, str], folder: Path) -> None:
    """Compare every tensor on disk, read one at a time, with the trained one.

    Args:
        trained: SHA-256 by name, of the source's tensors in the written dtype.
        written: the same as returned by `write_folder`.

    Raises:
        CheckpointError: a tensor is missing or its bytes differ; names it.
    """
    reloaded = FolderSource(folder)
    for name in sorted({*trained, *written, *reloaded.names()}):
        found = tensor_sha256(reloaded.read(name)) if name in reloaded.names() else None
        if not trained.get(name) == written.get(name) == found:
            raise CheckpointError(
                f"tensor {name} in {folder} differs from the trained one (SHA-256 {found}, trained "
                f"{trained.get(name)})",
                "the folder is not the trained model, so it is not published",
                "check the disk, then run the same command again",
            )


def copy_tokenizer(tokenizer: Path, folder: Path) -> None:
    """Copy the tokenizer's files beside the weights, with explicit settings for other programs.

    transformers 5 does not write whether begin and end tokens are added: it reads that from `tokenizer.json`.
    transformers 4 assumes that a Llama tokenizer adds a begin token, and llama.cpp assumes it for any SentencePiece
    model, even if the model was trained without one; hence the explicit settings. Without a padding token, texts could
    not be batched: a Llama tokenizer, which has none, gets its unknown token.
    """
    for pattern in TOKENIZER_FILES:
        for path in tokenizer.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        config = tokenizer_with_4x_names(json.loads(settings.read_text(encoding="utf-8")))
        unknown = config.get("unk_token")
        if not config.get("pad_token") and unknown and unknown != config.get("eos_token"):
            config["pad_token"] = unknown  # not the end token: fine-tuning would mask it along with the padding
        if (folder / "tokenizer.model").is_file() or str(config.get("tokenizer_class")).startswith("Llama"):
            with suppress(DataError):  # one that does not load is copied as it is, and refused by name where needed
                begin, end = ends_added(load_tokenizer(folder))
                config |= {"add_bos_token": begin, "add_eos_token": end}
        write_json(settings, config)


def _compare_logits(
    context: StageContext, stage: Export, source: WeightSource, partial: Path, dtype: torch.dtype
) -> dict[str, float]:
    """Largest logit difference between the written folder and the trained model, for each way of loading it."""
    parameters = count_parameters(source)
    # One rank decides for all: with different dtypes on different nodes they would wait for each other for ever.
    fits, exact = distributed.broadcast_object((fits_host(parameters), fits_devices(parameters)))
    # Float32 reveals the smallest difference; a large model is compared in its own dtype.
    precision = "float32" if exact or dtype == torch.float16 else str(dtype).removeprefix("torch.")
    batch = probe_batch(source.config)
    config = frozen_config(context.deepspeed_json(stage.deepspeed), precision=precision)
    logits = []
    for model in (Cast(source, dtype), FolderSource(partial)):
        with closing(FrozenHost(model, config, precision=precision)) as host:
            logits.append(host_logits(host, batch))

    def compare() -> dict[str, float]:
        differences = {"zero3": check_same_logits(logits[0], logits[1], "the ZeRO-3 host")}
        if fits and precision == "float32":  # its different rounding would look like a difference
            plain = plain_logits(partial, batch, DTYPES[precision])
            differences["transformers"] = check_same_logits(logits[0], plain, "plain transformers")
        return differences

    return distributed.on_main(compare)


def fits_host(parameters: int) -> bool:
    """Whether this many float32 parameters, loaded by plain transformers, fit into half of this host's memory."""
    return parameters * 4 <= _HOST_SHARE * host_memory_bytes()


def fits_devices(parameters: int) -> bool:
    """Whether this many float32 parameters fit into half of all ranks' device memory (on CPU: of this host's)."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return fits_host(parameters)
    return parameters * 4 <= _HOST_SHARE * accelerator.total_memory() * distributed.world_size()


def _metrics(partial: Path, source: WeightSource, dtype: torch.dtype, differences: dict[str, float]) -> dict[str, Any]:
    files = sorted(partial.glob("*.safetensors"))
    return {
        "parameters": count_parameters(source),
        "bytes": sum(path.stat().st_size for path in files),
        "files": len(files),
        "dtype": str(dtype).removeprefix("torch."),
        "max_logit_difference": max(differences.values()),
        "checked_by": sorted(differences),
    }
