"""The vendors' libraries through torch: `blas` on the CPU (MKL, oneDNN), `cublas` on a GPU."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

__all__ = ["multiply"]


def multiply(name: str, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, alpha: float, beta: float) -> None:
    if a.dtype == torch.int8 and name == "cublas":
        _accumulate(_int8(a, b), out, alpha, beta)
    elif a.dtype == torch.int8:
        _product(a.int(), b.int(), out, alpha, beta)
    elif a.dtype == torch.float16 and name == "blas" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        # Without instructions for it torch multiplies float16 an element at a time: 2.6 GFLOP/s where float32 has 101.
        _accumulate(torch.matmul(a.float(), b.float()), out, alpha, beta)
    else:
        _product(a, b, out, alpha, beta)


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, alpha: float, beta: float) -> None:
    if len(a) == 1:
        torch.addmm(out[0], a[0], b[0], alpha=alpha, beta=beta, out=out[0])
    else:
        torch.baddbmm(out, a, b, alpha=alpha, beta=beta, out=out)


def _int8(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """int32 [batch, m, n]. cuBLASLt wants more than 16 rows, and multiples of 8 in the other sizes."""
    (m, k), n = a.shape[-2:], b.shape[-1]
    a = pad(a, (0, -k % 8, 0, max(0, 17 - m)))
    b = pad(b, (0, -n % 8, 0, -k % 8))
    products = [torch._int_mm(one.contiguous(), other.contiguous()) for one, other in zip(a, b, strict=True)]
    return torch.stack(products)[:, :m, :n]


def _accumulate(product: torch.Tensor, out: torch.Tensor, alpha: float, beta: float) -> None:
    """out ← alpha · product + beta · out, rounded once."""
    product = product if alpha == 1 else product.mul_(alpha)
    out.copy_(product if beta == 0 else product.add_(out, alpha=beta))
