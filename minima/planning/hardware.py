"""GPUs by name, with the numbers that their vendor publishes, and GPUs that a user describes. No torch."""

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from minima.errors import RecipeError
from minima.recipe.overrides import RecipeLoader, nearest


class Gpu(BaseModel):
    """One kind of GPU and its links. Bandwidths are per GPU, in one direction.

    A vendor's GB is read as 1e9 bytes; devices report up to 7 % more.

    Attributes:
        name: its name on the command line.
        memory_bytes: memory of one device.
        peak_flops: dense bfloat16 matrix products accumulated in float32, in FLOP/s; half of what is published "with
            sparsity".
        float32_flops: float32 outside the tensor cores, in FLOP/s.
        memory_bandwidth: of its own memory, in bytes/s.
        node_bandwidth: to other GPUs of its machine, in bytes/s; half of what is published for both directions.
        network_bandwidth: to other machines, in bytes/s; None if the vendor publishes no machine with a network.
        host_bandwidth: to its machine's memory, in bytes/s; None if it is not known.
        gpus_per_node: GPUs in one machine.
        source: where the numbers are published.
        reported_as: part of the name under which PyTorch reports it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    memory_bytes: int = Field(gt=0)
    peak_flops: float = Field(gt=0)
    float32_flops: float | None = Field(default=None, gt=0)
    memory_bandwidth: float = Field(gt=0)
    node_bandwidth: float = Field(gt=0)
    network_bandwidth: float | None = Field(default=None, gt=0)
    host_bandwidth: float | None = Field(default=None, gt=0)
    gpus_per_node: int = Field(default=8, gt=0)
    source: str = "the user"
    reported_as: str | None = None


_HOPPER = {"peak_flops": 989.4e12, "float32_flops": 66.9e12, "node_bandwidth": 450e9, "network_bandwidth": 50e9}
_CARD = {"node_bandwidth": 32e9, "host_bandwidth": 32e9}  # PCIe 4.0 x16, published as 64 GB/s for both directions
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="h100", memory_bytes=80e9, memory_bandwidth=3.35e12, host_bandwidth=64e9, reported_as="H100 80GB HBM3",
            source="NVIDIA H100 Tensor Core GPU datasheet and Hopper architecture white paper (SXM5); network: NVIDIA "
            "DGX H100 datasheet, 8 x 400 Gb/s", **_HOPPER,
        ),
        Gpu(
            name="h200", memory_bytes=141e9, memory_bandwidth=4.8e12, host_bandwidth=64e9, reported_as="H200",
            source="NVIDIA H200 Tensor Core GPU datasheet (SXM); network: NVIDIA DGX H200 datasheet, 8 x 400 Gb/s",
            **_HOPPER,
        ),
        Gpu(
            name="b200", memory_bytes=180e9, peak_flops=2.25e15, float32_flops=80e12, memory_bandwidth=8e12,
            node_bandwidth=900e9, network_bandwidth=50e9, host_bandwidth=64e9, reported_as="B200",
            source="NVIDIA DGX B200 datasheet (1,440 GB and 8 x 400 Gb/s for 8 GPUs) and Blackwell architecture brief",
        ),
        Gpu(
            name="a100-80", memory_bytes=80e9, peak_flops=312e12, float32_flops=19.5e12, memory_bandwidth=2.039e12,
            node_bandwidth=300e9, network_bandwidth=25e9, host_bandwidth=32e9, reported_as="A100-SXM4-80GB",
            source="NVIDIA A100 80GB Tensor Core GPU datasheet (SXM); network: NVIDIA DGX A100 datasheet, 8 x 200 Gb/s",
        ),
        Gpu(
            name="l40s", memory_bytes=48e9, peak_flops=362.05e12, float32_flops=91.6e12, memory_bandwidth=864e9,
            reported_as="L40S", source="NVIDIA L40S datasheet (no network is published with it)", **_CARD,
        ),
        Gpu(
            name="4090", memory_bytes=24e9, peak_flops=165.2e12, float32_flops=82.6e12, memory_bandwidth=1.008e12,
            reported_as="RTX 4090",
            source="NVIDIA Ada GPU architecture white paper (no network is published with it)", **_CARD,
        ),
    )
}  # fmt: skip


def find_gpu(name: str, **changes: float | None) -> Gpu:
    """A GPU from the table, or one that a YAML file describes.

    Args:
        name: a name in the table, or the path of a YAML file with the fields of `Gpu`.
        changes: fields to replace; None leaves a field as it is.

    Raises:
        RecipeError: there is no such GPU or file, or the result does not describe a GPU.
    """
    if name.lower() in GPUS:
        found = GPUS[name.lower()].model_dump()
    elif Path(name).suffix in (".yaml", ".yml"):
        found = {"name": Path(name).stem} | _read(Path(name).expanduser())
    else:
        asked = name.lower()  # an h100-80gb is not an a100-80, nor an a100 an h100
        alike = [known for known in GPUS if known.startswith(asked) or re.match(rf"{known.split('-')[0]}\b", asked)]
        raise RecipeError(
            f"the GPU {name!r} is not known{nearest((alike or [asked])[0], list(GPUS))}",
            "memory and time are computed from what its vendor publishes",
            f"choose among {', '.join(GPUS)}, or give a YAML file with {', '.join(_required())}",
        )
    try:
        return Gpu.model_validate(found | {field: value for field, value in changes.items() if value is not None})
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise RecipeError(
            f"the GPU {name!r} has {wrong}",
            "memory and time are computed from these numbers",
            f"give {', '.join(_required())} in bytes, FLOP/s and bytes/s, and the others as `Gpu` describes them",
        ) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), Loader=RecipeLoader)
        problem = "" if isinstance(found, dict) else "it does not map fields to numbers"
    except (OSError, ValueError, yaml.YAMLError) as error:
        found, problem = None, " ".join(str(error).split())
    if problem:
        raise RecipeError(
            f"{path} cannot be read as a GPU: {problem}",
            "memory and time are computed from its numbers",
            f"write a YAML file with {', '.join(_required())}",
        )
    return found


def _required() -> list[str]:
    return [name for name, field in Gpu.model_fields.items() if field.is_required() and name != "name"]
