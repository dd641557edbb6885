"""A frozen model in ZeRO-3's shards: over all ranks or those of a node; in the device's memory, the host's, or on NVMe.

DeepSpeed's hooks gather each layer's weights before it runs and release them after it.
"""

import contextlib
import math
import mmap
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from transformers import PreTrainedModel

from minima.batch import Batch
from minima.engine import distributed
from minima.engine.layers import gather_whole_layers
from minima.engine.ops import load_op
from minima.engine.sharded import build_sharded, release, sharded_parameters
from minima.engine.teacher.root import FrozenRoot
from minima.engine.teacher.window import LayerWindow
from minima.errors import RecipeError
from minima.launcher import node_name
from minima.models.causal_lm import head_weight, hidden_states
from minima.models.linear_layers import use_cpu_products
from minima.models.weights import WeightSource


class Zero3:
    """Shards of a frozen model, gathered layer by layer.

    Args:
        source: weights and shape.
        config: DeepSpeed's, stage 3 and without an optimiser.
        precision: `float32` or `bfloat16`.
        group: ranks that share one copy; all if not given.
        layers: called with the built model, before any hook is on it.
        windows: several micro-batches may share one traversal of the layers. Each layer is then gathered as a whole,
            whatever `layers` does.
    """

    def __init__(
        self,
        source: WeightSource,
        config: dict[str, Any],
        precision: str,
        *,
        group: dist.ProcessGroup | None = None,
        layers: Callable[[PreTrainedModel], None] = lambda model: None,
        windows: bool = False,
    ) -> None:
        config = _with_buffers(config, source, dist.get_world_size(group))
        self._nvme = _nvme_folder(config)
        if self._nvme is not None:
            _check_folder(self._nvme)
        self.model = build_sharded(source, config, precision, group)
        self.model.requires_grad_(False)
        self.model.eval()
        self._window: LayerWindow | None = None
        use_cpu_products(self.model)
        layers(self.model)
        if windows:
            gather_whole_layers(self.model)
            self._window = LayerWindow(self.model)
        # No optimiser here and none in the configuration: DeepSpeed then only shards and gathers.
        self._engine = deepspeed.initialize(model=FrozenRoot(self.model), config=config)[0]
        self._root = self._engine.module

    def call(self, function: Callable[[PreTrainedModel, Batch], Any], batch: Batch) -> Any:
        """The result of `function(model, batch)`, called inside the root's forward."""
        return self._root(function, batch)

    def hidden_states(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Final hidden states [B, T, E] of each micro-batch."""
        if self._window is None or len(batches) == 1:
            return [self._root(hidden_states, batch) for batch in batches]
        hidden_RTE = self._root(self._window.hidden_states, batches)
        return list(hidden_RTE.split([len(batch.input_ids_BT) for batch in batches]))

    def head(self) -> Tensor:
        """The whole output head [V, E]; every rank calls it."""
        weight = head_weight(self.model)
        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().clone()

    def held_bytes(self) -> dict[str, int]:
        """Bytes of weights that this rank keeps between calls, by where they lie: `device`, `host`, `nvme`."""
        held = {"device": 0, "host": 0, "nvme": 0}
        for _, parameter in sharded_parameters(self.model):
            shard = parameter.ds_tensor
            size = shard.ds_numel * parameter.element_size()
            if shard.final_location is not None:
                held["nvme"] += size
            elif shard.device.type == "cpu" and distributed.device().type != "cpu":
                held["host"] += size
            else:
                held["device"] += size
            held["device"] += parameter.numel() * parameter.element_size()  # whole, if it is kept gathered
        return held

    def close(self) -> None:
        """Free the memory, and remove the files."""
        self._engine.destroy()
        swappers = {id(swapper): swapper for _, p in sharded_parameters(self.model) if (swapper := p.nvme_swapper)}
        for swapper in swappers.values():
            swapper.aio_read_handle.free_cpu_locked_tensor(swapper.buffers)
            vars(swapper).clear()
        root = self._root
        del self._engine, self._root, self.model
        self._window = None
        release(root)
        if self._nvme is not None:
            _remove(self._nvme)


def _nvme_folder(config: dict[str, Any]) -> Path | None:
    """This rank's folder of shards on NVMe, as DeepSpeed names it; None without offload to NVMe."""
    offload = config["zero_optimization"].get("offload_param") or {}
    if offload.get("device") != "nvme":
        return None
    dtype = "bfloat16" if config["bf16"]["enabled"] else "float32"
    return Path(offload["nvme_path"]) / "zero_stage_3" / f"{dtype}params" / f"rank{distributed.rank()}"


def _check_folder(folder: Path) -> None:
    """Refuse a teacher on NVMe if a rank cannot write its shards. Every rank calls it; one rank's error ends all.

    Args:
        folder: this rank's, from `_nvme_folder`; it is created.

    Raises:
        RecipeError: names the folder and the machine.
    """

    def cannot(error: OSError) -> RecipeError:
        return RecipeError(
            f"the teacher has offload: nvme, but its shards cannot be written to {folder} on {node_name()} ({error})",
            "DeepSpeed keeps them there as files, and reads each layer's before it runs",
            "set nvme_path to a writable folder on a local disk of every node, or use offload: cpu",
        )

    try:
        with distributed.refused_together(cannot):
            check_nvme()
            folder.mkdir(parents=True, exist_ok=True)
            _write_probe(folder / "probe")
    except RecipeError:
        _remove(folder)
        raise


def _write_probe(path: Path) -> None:
    """Write a page that bypasses the page cache, as DeepSpeed writes shards: some file systems refuse that."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    try:
        os.write(descriptor, mmap.mmap(-1, mmap.PAGESIZE))  # O_DIRECT requires aligned memory
    finally:
        os.close(descriptor)
        path.unlink()


def _remove(folder: Path) -> None:
    """Remove a rank's folder, and the three above it, DeepSpeed's and the run's own, once no rank has files there."""
    shutil.rmtree(folder, ignore_errors=True)
    for parent in list(folder.parents)[:3]:
        with contextlib.suppress(OSError):  # another rank still has files there: the last one removes it
            parent.rmdir()


def _with_buffers(config: dict[str, Any], source: WeightSource, ranks: int) -> dict[str, Any]:
    """The configuration, with buffers for reading shards from NVMe unless the JSON sets them.

    The largest shard must fit into one buffer. At any time one layer's tensors are in use and those of the next two are
    being read, besides embedding and head.
    """
    zero = config["zero_optimization"]
    offload = zero.get("offload_param") or {}
    if offload.get("device") != "nvme":
        return config
    numels = {name: math.prod(source.shape(name)) for name in source.names()}
    layers = Counter(number for name in numels if (number := _layer_number(name)) is not None)
    wanted = {
        "buffer_size": -(-max(numels.values()) // ranks),
        "buffer_count": 3 * max(layers.values(), default=0) + 2,
    }
    return config | {"zero_optimization": zero | {"offload_param": wanted | offload}}


def _layer_number(name: str) -> str | None:
    return next((part for part in name.split(".") if part.isdigit()), None)


def check_nvme() -> None:
    """Refuse a teacher on NVMe if DeepSpeed cannot read from there.

    Raises:
        RecipeError: DeepSpeed's op for asynchronous I/O cannot be built or loaded.
    """
    builder = get_accelerator().create_op_builder("AsyncIOBuilder")
    if not builder.is_compatible(verbose=False):
        raise RecipeError(
            "the teacher has offload: nvme, but libaio or a C compiler is not installed",
            "DeepSpeed reads shards through libaio, and needs its headers to build the op for that",
            "install libaio-dev (Debian) or libaio-devel (Fedora), and gcc, on every node, or use offload: cpu",
        )
    try:
        load_op(builder)  # here, so that a killed build cannot block DeepSpeed's own loading of it
    except Exception as error:  # a compiler, a linker or DeepSpeed's probe of the machine may raise anything
        raise RecipeError(
            f"the teacher has offload: nvme, but DeepSpeed's op for asynchronous I/O cannot be built: {error}",
            "DeepSpeed reads shards through it",
            "install g++, ninja, Python's headers and, with GPUs, the CUDA toolkit on every node, or use offload: cpu",
        ) from error
