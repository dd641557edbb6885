"""Float32 matrix products on CPUs whose AVX-512 PyTorch leaves unused: its MKL uses it on Intel's processors only.

PyTorch multiplies bfloat16 with oneDNN, which uses AVX-512 on every processor that has it. oneDNN's float32 kernels are
reached here through the operator that `torch.compile` calls for linear layers. `tools/bench_distil.py` measures both
libraries as its ceilings.

Shapes: M rows and K columns of the left factor, N rows of the right factor.
"""

import functools
import re
from pathlib import Path

import torch
from torch import Tensor

_CPU_FACTS = Path("/proc/cpuinfo")
_TILE_ELEMENTS = 2**18  # 1 MB of results, which stay in the cache; large ones would be new pages in every call


def is_faster(*factors: Tensor) -> bool:
    """Whether `product` beats `torch.mm` for large factors of this dtype, on this processor.

    Not decided by a timing, so all runs on a machine use the same kernels and give the same bits. False while
    `torch.backends.mkldnn.enabled` is False.
    """
    suitable = all(one.dtype == torch.float32 and one.device.type == "cpu" for one in factors)
    return suitable and bool(torch.backends.mkldnn.enabled) and _mkl_lacks_avx512()


@functools.cache
def _mkl_lacks_avx512() -> bool:
    """Whether this processor has AVX-512, MKL does not use it, and oneDNN can be called instead."""
    if not torch.backends.mkl.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return "AVX512" in torch.backends.cpu.get_cpu_capability() and _maker() not in ("", "GenuineIntel")


def _maker() -> str:
    """The processor's `vendor_id`; empty if the system does not tell."""
    try:
        found = re.search(r"^vendor_id\s*:\s*(\S+)", _CPU_FACTS.read_text(encoding="ascii", errors="replace"), re.M)
    except OSError:
        return ""
    return found[1] if found else ""


def product(left_MK: Tensor, right_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """`left right^T + bias` [M, N] by oneDNN, without autograd; dimensions may precede M.

    The left factor is copied unless it is contiguous; the right one unless it or its transpose is.
    """
    return torch.ops.minima.product(left_MK, right_NK, bias_N)


# An operator of our own, which `torch.compile` calls as it is: it takes the right factor of oneDNN's for a constant.
_library = torch.library.Library("minima", "DEF")
_library.define("product(Tensor left, Tensor right, Tensor? bias) -> Tensor")
PRODUCT = torch.ops.minima.product.default


@torch.library.impl(_library, "product", "CPU")
def _product(left_MK: Tensor, right_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    bias_N = None if bias_N is None else bias_N.contiguous()  # oneDNN ignores its stride
    if not right_NK.shape[1]:  # oneDNN refuses what has no columns
        zeros_MN = left_MK.new_zeros((*left_MK.shape[:-1], right_NK.shape[0]))
        return zeros_MN if bias_N is None else zeros_MN + bias_N
    if not (right_NK.is_contiguous() or right_NK.t().is_contiguous()):
        right_NK = right_NK.contiguous()  # for other strides oneDNN has only its reference kernel
    return torch.ops.mkldnn._linear_pointwise(left_MK.contiguous(), right_NK, bias_N, "none", [], "")


@torch.library.register_fake("minima::product", lib=_library)
def _shape_of_product(left_MK: Tensor, right_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    return left_MK.new_empty((*left_MK.shape[:-1], right_NK.shape[0]))


def product_into(out_MN: Tensor, left_MK: Tensor, right_NK: Tensor) -> Tensor:
    """Write `left right^T` to `out_MN`, which may be large, and return it."""
    left_MK = left_MK.contiguous()
    for tile in _tiles(right_NK.shape[0], left_MK.shape[0]):
        out_MN[:, tile].copy_(product(left_MK, right_NK[tile]))
    return out_MN


def add_transposed_product(sum_NK: Tensor, left_MN: Tensor, right_MK: Tensor) -> None:
    """`sum_NK += left^T right`, where N may be large."""
    right_KM = right_MK.t().contiguous()
    for tile in _tiles(left_MN.shape[1], max(right_KM.shape)):
        sum_NK[tile].add_(product(right_KM, left_MN[:, tile].contiguous().t()).t())


def _tiles(columns: int, rows: int) -> list[slice]:
    """The columns of a matrix with `rows` rows, divided into tiles that stay in the cache."""
    width = max(64, _TILE_ELEMENTS // max(rows, 1))
    return [slice(start, min(start + width, columns)) for start in range(0, columns, width)]
