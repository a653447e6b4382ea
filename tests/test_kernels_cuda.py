"""Kernels of the GPU: in Numba's simulator and Triton's interpreter, compiled ahead of time, and on a GPU if there is.

What is proven without a GPU: the products, of everything but bfloat16; that every barrier and bounds test is needed;
that the code for three architectures fits its registers, loads 128 bits at a time and uses the tensor cores.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache

import pytest
import torch

from subscribers.kernels import KERNELS
from subscribers.kernels.__main__ import HEADER, LADDER, TENSOR_DTYPES, _row
from subscribers.kernels.assembly import ARCHITECTURES, Program, ladder, tensor_cores

from .kernel_grid import FAMILIES, cases, failures
from .programs import ROOT

SIMULATORS = {"cuda_ladder": "NUMBA_ENABLE_CUDASIM", "tensor_cores": "TRITON_INTERPRET"}
NAMES = [(family, name) for family, (names, _) in FAMILIES.items() for name in names]
MUTATIONS = [(family, mutation) for family, (_, mutations) in FAMILIES.items() for mutation in mutations]


@cache
def simulated(family: str) -> dict[str, list[str]]:
    """What failed, by kernel and by mutation."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.kernel_grid", family],
        env={**os.environ, SIMULATORS[family]: "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


@cache
def compiled(kernel: str, dtype: str, architecture: str) -> Program:
    return tensor_cores(dtype, architecture) if kernel == "triton" else ladder(kernel, dtype, architecture)


@pytest.mark.parametrize(("family", "name"), NAMES)
def test_products_of_awkward_shapes_strides_and_dtypes_are_exact(family: str, name: str) -> None:
    assert simulated(family)[name] == []


@pytest.mark.parametrize(("family", "mutation"), MUTATIONS)
def test_without_a_barrier_or_a_bounds_test_the_product_is_wrong(family: str, mutation: str) -> None:
    """Not one of them is there in vain, and the grid would notice."""
    assert simulated(family)[mutation] != []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing was run on one")
@pytest.mark.parametrize("name", [name for name, kernel in KERNELS.items() if kernel.device == "cuda"])
def test_products_are_exact_on_the_gpu(name: str) -> None:
    kernel = KERNELS[name]
    assert failures(kernel, cases(kernel, kernel.dtypes, large=True), "cuda") == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_thread_an_element_needs_no_shared_memory(architecture: str) -> None:
    program = compiled("cuda-naive", "float32", architecture)
    assert (program.stack, program.spills, program.shared) == (0, 0, 0)
    assert program.registers <= 64  # or a block of 1024 threads could not start


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tiles_wait_at_two_barriers(architecture: str) -> None:
    program = compiled("cuda-tiled", "float32", architecture)
    assert (program.stack, program.spills) == (0, 0)
    assert program.registers <= 64
    assert program.shared in (2 * 32 * 32 * 4, 2 * 32 * 32 * 4 + 1024)  # since sm_90 the system takes 1 KB
    assert program.count("BAR") == 2


@pytest.mark.parametrize(
    ("dtype", "architecture"),
    [("float32", architecture) for architecture in ARCHITECTURES]
    + [(dtype, "sm_90") for dtype in ("float64", "float16", "int64", "int32", "int8")],
)
def test_a_tile_of_c_stays_in_registers(dtype: str, architecture: str) -> None:
    program = compiled("cuda-register", dtype, architecture)
    assert (program.stack, program.spills) == (0, 0)
    assert program.registers <= 128
    assert program.blocks >= 2
    assert program.shared <= 10 << 10
    assert program.count("BAR") == 2
    assert program.count("LDS", modifier="128") >= 4  # both factors of a step


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_64_multiply_adds_a_step_take_four_loads_from_shared_memory(architecture: str) -> None:
    program = compiled("cuda-register", "float32", architecture)
    assert program.fused == 64
    assert program.count("LDS", modifier="128") in (4, 5)
    assert program.count("LDG", modifier="128") == 2  # one of A and one of B, where rows are aligned


@pytest.mark.parametrize("dtype", TENSOR_DTYPES)
@pytest.mark.parametrize(
    ("architecture", "instruction", "in_ptx"),
    [("sm_80", "HMMA", "mma.sync"), ("sm_90", "HGMMA", "wgmma.mma_async"), ("sm_100", "UTCHMMA", "tcgen05.mma")],
)
def test_tensor_cores_multiply(dtype: str, architecture: str, instruction: str, in_ptx: str) -> None:
    program = compiled("triton", dtype, architecture)
    kind = {"float16": "f16", "bfloat16": "bf16", "float32": "tf32"}[dtype]
    assert program.count(instruction) > 0
    assert program.fused == 0  # nothing is left to the ordinary ones
    assert any(in_ptx in line and (kind in line or "kind::f16" in line) for line in program.ptx.splitlines())


@pytest.mark.parametrize("dtype", TENSOR_DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_slices_are_fetched_ahead_without_passing_through_registers(dtype: str, architecture: str) -> None:
    program = compiled("triton", dtype, architecture)
    assert (program.stack, program.spills) == (0, 0)
    assert program.registers <= 176
    slice_bytes = 2 * 128 * 64 * 2  # of A and B; float32 is twice as wide, at half the depth
    assert program.shared >= 3 * slice_bytes
    assert program.blocks >= 1
    wide, all_of_them = program.count("LDGSTS", modifier="128"), program.count("LDGSTS")
    if dtype == "float32" and architecture != "sm_80":
        # These tensor cores take TF32 only with k innermost: a row-major B is turned around as it is copied.
        assert wide >= all_of_them / 5
    else:
        assert wide == all_of_them > 0


def test_the_table_in_the_docs_is_what_the_compilers_say() -> None:
    text = (ROOT / "docs/kernels.md").read_text()
    rows = [_row(compiled(kernel, "float32", architecture)) for kernel in LADDER for architecture in ARCHITECTURES]
    rows += [_row(compiled("triton", dtype, architecture)) for dtype in TENSOR_DTYPES for architecture in ARCHITECTURES]
    assert HEADER + "".join(rows) in text, "run `python -m subscribers.kernels --report docs/kernels.md`"
