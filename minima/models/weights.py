"""Weights by name, read lazily: no reader here holds more than one tensor at a time, no writer more than one file."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minima.disk import inside
from minima.errors import CheckpointError
from minima.models.config_file import read_config
from minima.models.legacy_config import stored_name, with_4x_names
from minima.models.stock import architecture, parameter_shapes
from minima.models.tensor_file import save_tensors

INDEX_NAME = "model.safetensors.index.json"
# A tensor's identity hashes its first and last elements and samples in between. One optimiser step changes some of the
# first 4,096 elements of any matrix. The samples get denser towards the end, where a grown vocabulary has its new rows,
# so that a model that differs only in those is told apart, even with padding rows after them.
_IDENTITY_ELEMENTS, _SAMPLE_ELEMENTS = 4096, 1024
_SAMPLES = (1 / 4, *(1 - 2.0**-power for power in range(1, 9)))


class WeightSource(Protocol):
    """Tensors of one stock model by parameter name; a tied head is not listed in addition to its embedding."""

    config: dict[str, Any]

    def names(self) -> list[str]:
        """Parameter names, in the model's order."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it."""
        ...

    def read(self, name: str) -> Tensor:
        """One whole tensor on the CPU, in its stored dtype."""
        ...

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of one flattened tensor: the part that one ZeRO-3 rank needs."""
        ...


class MemorySource:
    """Weights that are already in memory, for tests and small models."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.config = config
        self._tensors = tensors

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str) -> Tensor:
        return self._tensors[name]

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        return self._tensors[name].reshape(-1)[start:stop]


class ShapedSource:
    """The part of a `WeightSource` that follows from the shapes of all its tensors."""

    _shapes: Mapping[str, tuple[int, ...]]

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]


class RandomSource(ShapedSource):
    """Randomly initialised weights that depend only on the seed and each tensor's name, not on the number of ranks.

    Matrices are normally distributed with the configuration's `initializer_range` (0.02 if it has none), norm weights
    are one and biases zero, as in Llama's stock initialisation.
    """

    def __init__(self, config: dict[str, Any], seed: int) -> None:
        self.config = config
        self.seed = seed
        self._shapes = parameter_shapes(config)

    def read(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.empty(shape).normal_(0.0, self.config.get("initializer_range", 0.02), generator=generator)

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        return self.read(name).reshape(-1)[start:stop]


class FolderSource(ShapedSource):
    """Weights from a folder in Hugging Face's layout, with one or many safetensors files.

    Raises:
        CheckpointError: the config, a safetensors file or a tensor is missing, damaged or does not fit the others.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = read_config(folder)
        stored = self._stored_files()
        self._check_layers(len(stored))  # before a model of so many is built
        self._shapes = parameter_shapes(self.config)
        # Checkpoints of a bare backbone lack the base model's prefix.
        prefix = next(iter(self._shapes)).split(".")[0] + "."
        prefix = "" if any(name.startswith(prefix) for name in stored) else prefix
        self._where: dict[str, tuple[Path, str]] = {}
        for name in self._shapes:
            names = (stored_name(self.config["model_type"], name), name, name.removeprefix(prefix))
            key = next((key for key in names if key in stored), None)
            if key is None:
                raise CheckpointError(
                    f"{folder} has no tensor {name!r}",
                    "the model would run with random weights in its place",
                    "download or write the folder again",
                )
            self._where[name] = (stored[key], key)
        self._check_shapes()

    def _stored_files(self) -> dict[str, Path]:
        index, single = self.folder / INDEX_NAME, self.folder / "model.safetensors"
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise CheckpointError(
                    f"{index} cannot be read: {error!r}",
                    "it says which file holds which tensor",
                    "download or write the folder again",
                ) from error
            return {name: inside(self.folder, file) for name, file in weight_map}
        if not single.is_file():
            pickles = [path.name for kind in ("*.bin", "*.pt*") for path in sorted(self.folder.glob(kind))]
            raise CheckpointError(
                f"no safetensors file in {self.folder}" + (f", only {', '.join(pickles)}" if pickles else ""),
                "loading a pickle executes code" if pickles else "there are no weights to load",
                "convert it to safetensors (`save_pretrained` does)" if pickles else "check the path",
            )
        with _open(single) as file:
            return dict.fromkeys(file.keys(), single)

    def _check_layers(self, num_tensors: int) -> None:
        layers = self.config.get("num_hidden_layers", self.config.get("n_layer"))
        if layers is not None and not (isinstance(layers, int) and 0 < layers <= num_tensors):
            raise CheckpointError(
                f"{self.folder / 'config.json'} says {layers!r} layers, but the files hold {num_tensors:,} tensors",
                "every layer has tensors of its own, so weights and configuration belong to different models",
                "download or write the folder again",
            )

    def _check_shapes(self) -> None:
        by_file: dict[Path, list[str]] = {}
        for name, (path, _) in self._where.items():
            by_file.setdefault(path, []).append(name)
        for path, names in by_file.items():
            with _open(path) as file:
                for name in names:
                    found = tuple(file.get_slice(self._where[name][1]).get_shape())
                    if found != self._shapes[name]:
                        raise CheckpointError(
                            f"{name} in {path} has shape {found}, but config.json says {self._shapes[name]}",
                            "weights and configuration belong to different models",
                            "download or write the folder again",
                        )

    def read(self, name: str) -> Tensor:
        path, key = self._where[name]
        with _open(path) as file:
            return file.get_tensor(key)

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        path, key = self._where[name]
        shape = self._shapes[name]
        row = math.prod(shape[1:])
        first, last = start // row, -(-stop // row)  # read only the rows that contain the elements
        with _open(path) as file:
            rows = file.get_slice(key)[first:last]
        return rows.reshape(-1)[start - first * row : stop - first * row]


def _open(path: Path) -> Any:
    try:
        if path.is_fifo():  # opening it would wait for ever
            raise OSError("it is a named pipe")
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors: {error}",
            "the file is missing, truncated or damaged",
            "download or write it again",
        ) from error


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def model_identity(source: WeightSource) -> str:
    """A short hash of every tensor's name, shape, ends and samples: equal for a copy, different after a step."""
    digest = hashlib.sha256()
    for name in source.names():
        digest.update(f"{name}{source.shape(name)}".encode())
        # A random tensor is generated whole for any part of it, so do that once.
        drawn = MemorySource({}, {name: source.read(name)}) if isinstance(source, RandomSource) else source
        for start, stop in _identity_parts(math.prod(source.shape(name))):
            digest.update(drawn.read_flat(name, start, stop).float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def _identity_parts(size: int) -> list[tuple[int, int]]:
    """The ranges of a flattened tensor's elements to hash; everything for a small one."""
    if size <= 2 * _IDENTITY_ELEMENTS:
        return [(0, size)]
    last = size - _IDENTITY_ELEMENTS
    inside = [(start, min(start + _SAMPLE_ELEMENTS, size)) for start in (int(size * sample) for sample in _SAMPLES)]
    return [(0, _IDENTITY_ELEMENTS), *(part for part in inside if part[0] < last), (last, size)]


def write_folder(
    folder: Path,
    config: dict[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 4_000_000_000,
) -> dict[str, str]:
    """Write a model in Hugging Face's layout, holding one file's tensors at a time.

    Args:
        folder: created if it does not exist.
        config: `config.json`'s content; the dtype is set, and the names that transformers 4.x reads are added.
        tensors: name and tensor, consumed one by one.
        dtype: of the written tensors; each tensor's own if not given.
        shard_bytes: a new file is started before one would exceed this; a larger tensor gets a file of its own.

    Returns:
        SHA-256 of each written tensor's bytes, by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    hashes: dict[str, str] = {}
    shards: list[dict[str, Tensor]] = [{}]
    files: list[tuple[Path, list[str]]] = []
    pending_bytes = total_bytes = 0

    def flush() -> None:
        nonlocal pending_bytes
        path = folder / f"model-{len(files) + 1:05d}.safetensors.partial"
        save_tensors(shards[0], path, metadata={"format": "pt"})
        files.append((path, list(shards[0])))
        shards[0] = {}
        pending_bytes = 0

    written_dtype = dtype
    for name, tensor in tensors:
        tensor = tensor.to(dtype=dtype or tensor.dtype).contiguous()
        written_dtype = written_dtype or tensor.dtype
        size = tensor.numel() * tensor.element_size()
        if pending_bytes and pending_bytes + size > shard_bytes:
            flush()
        key = stored_name(config["model_type"], name)
        shards[0][key] = tensor.clone() if tensor._base is not None else tensor  # a view would keep its base alive
        hashes[name] = tensor_sha256(tensor)
        pending_bytes += size
        total_bytes += size
    flush()
    config = {"architectures": [architecture(config)]} | config
    full_config = with_4x_names(config | {"dtype": str(written_dtype).removeprefix("torch.")})
    (folder / "config.json").write_text(json.dumps(full_config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(files, start=1):
        final = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        path.rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    if len(files) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return hashes
