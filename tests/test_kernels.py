"""Kernels of the CPU, the registry and what it measures. Those of the GPU: test_kernels_cuda.py."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.settings import settings as pipeline_settings
from subscribers.kernels import DTYPES, KERNELS, Kernel, KernelUnavailable, choose, measured_peak, tuning
from subscribers.kernels.systolic import run, wavefront

from .kernel_grid import cases, failures
from .programs import ROOT

CPU = [name for name, kernel in KERNELS.items() if kernel.device == "cpu"]
HAS_CUDA = torch.cuda.is_available()


@pytest.mark.parametrize("name", CPU)
def test_products_of_awkward_shapes_strides_and_dtypes_are_exact(name: str) -> None:
    kernel = KERNELS[name]
    assert failures(kernel, cases(kernel, kernel.dtypes, large=name != "systolic"), "cpu") == []


@pytest.mark.parametrize("name", CPU)
def test_floats_are_rounded_as_in_float64_and_then_once(name: str) -> None:
    torch.manual_seed(1)
    for dtype, tolerance in (("float64", 1e-13), ("float32", 1e-5), ("float16", 2e-3), ("bfloat16", 1e-2)):
        a, b = (torch.randn(shape).to(getattr(torch, dtype)) for shape in ((40, 100), (100, 30)))
        wanted = a.double() @ b.double()
        error = (KERNELS[name].multiply(a, b).double() - wanted).abs().max() / wanted.abs().max()
        assert error < tolerance, dtype


@pytest.mark.parametrize("name", ["blas", "blocked"])
def test_integers_wrap_around_as_numpys_do(name: str) -> None:
    a = np.full((2, 3), 2**30, np.int32)
    product = KERNELS[name].multiply(torch.from_numpy(a), torch.from_numpy(a.T.copy()))
    assert np.array_equal(product.numpy(), a @ a.T)


def test_out_may_be_c() -> None:
    a, b, c = torch.ones(3, 4), torch.ones(4, 5), torch.full((3, 5), 2.0)
    assert KERNELS["blas"].multiply(a, b, beta=10.0, c=c, out=c) is c
    assert torch.equal(c, torch.full((3, 5), 24.0))


def test_blocked_may_be_called_from_several_threads() -> None:
    a, b = torch.ones(200, 300), torch.ones(300, 100)
    products: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: products.append(KERNELS["blocked"].multiply(a, b))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(product, torch.full((200, 100), 300.0)) for product in products)
    assert len(products) == 8


@pytest.mark.parametrize(
    ("operands", "more", "expected"),
    [
        (((2, 3), (4, 5)), {}, "expected [..., m, k] and [..., k, n]"),
        (((3,), (3, 5)), {}, "expected [..., m, k] and [..., k, n]"),
        (((2, 2, 3), (3, 3, 5)), {}, "leading dimensions do not broadcast"),
        (((2, 3), (3, 5)), {"beta": 1}, "there is no C; expected one of shape [2, 5]"),
        (((2, 3), (3, 5)), {"beta": 1, "c": torch.ones(3)}, "expected float32 of shape [2, 5]"),
        (((2, 3), (3, 5)), {"beta": 1, "c": torch.ones(4, 2, 5)}, "expected float32 of shape [2, 5]"),
        (((2, 3), (3, 5)), {"out": torch.ones(5, 2)}, "expected float32 of [2, 5]"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_expected(operands: Any, more: Any, expected: str) -> None:
    a, b = map(torch.ones, operands)
    with pytest.raises(ValueError, match=re.escape(expected)):
        KERNELS["blas"].multiply(a, b, **more)


def test_dtypes_that_differ_are_refused_and_so_are_fractions_of_integers() -> None:
    with pytest.raises(ValueError, match="A is float32 and B float64"):
        KERNELS["blas"].multiply(torch.ones(2, 2), torch.ones(2, 2).double())
    whole = torch.ones(2, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="expected integers from -2147483648 to 2147483647, as A and B are int32"):
        KERNELS["blas"].multiply(whole, whole, alpha=0.5)


@pytest.mark.parametrize(
    ("device", "dtype", "name", "reason"),
    [
        ("auto", "float32", "blass", "there is no kernel 'blass'; known: blas, blocked"),
        ("cuda", "float32", "blas", "runs on cpu, and the job asks for device 'cuda'"),
        ("auto", "float64", "triton", "does not multiply float64; it does float32, float16, bfloat16"),
        ("cpu", "complex64", None, "no kernel multiplies complex64 on cpu"),
        pytest.param(
            *("auto", "float32", "cuda-tiled", "needs a CUDA device, and there is none here"),
            marks=pytest.mark.skipif(HAS_CUDA, reason="there is a GPU"),
        ),
        pytest.param(
            *("cuda", "float32", None, "there is no CUDA device here; use 'auto' or 'cpu'"),
            marks=pytest.mark.skipif(HAS_CUDA, reason="there is a GPU"),
        ),
    ],
)
def test_a_kernel_that_cannot_be_says_why(device: Any, dtype: str, name: str | None, reason: str) -> None:
    with pytest.raises(KernelUnavailable) as refused:
        choose(device, dtype, 2, 2, 2, name=name)
    assert reason in str(refused.value)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "subscribers.kernels.tensor_cores", raising=False)
    kernel = Kernel("another", "cuda", ("float32",), "tensor_cores", "cuda")
    assert kernel.unavailable() == "kernel 'another' needs triton: pip install 'redis-ml-pipeline[cuda]'"


def test_a_job_gets_the_kernel_it_names() -> None:
    assert choose("auto", "float32", 5, 5, 5, name="systolic").name == "systolic"


def test_one_candidate_is_not_measured(measured: Path) -> None:
    assert choose("cpu", "float32", 100, 100, 100).name == "blas"
    assert not measured.exists()


def test_the_fastest_is_measured_once_a_shape_class_and_kept_for_other_processes(
    measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = choose("cpu", "int32", 100, 100, 100)
    (place,) = json.loads(measured.read_text()).values()
    seconds = place["choices"]["int32 128 128 128"]["seconds"]
    assert set(seconds) == {"blas", "blocked"}
    assert chosen.name == min(seconds, key=seconds.__getitem__)

    monkeypatch.setattr(tuning, "_seconds", forbidden)
    assert choose("cpu", "int32", 120, 130, 99) is chosen
    monkeypatch.setattr(tuning, "_memory", {})  # as in another process
    assert choose("cpu", "int32", 100, 100, 100) is chosen
    with pytest.raises(AssertionError, match="measured again"):
        choose("cpu", "int32", 100, 100, 1000)


def test_the_faster_one_is_taken(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for fast in ("blas", "blocked"):
        monkeypatch.setattr(tuning, "_memory", {})
        monkeypatch.setattr(tuning, "_seconds", lambda kernel, *_: 1.0 if kernel.name == fast else 2.0)  # noqa: B023
        assert choose("cpu", "int8", 8, 8, 8).name == fast
        measured.unlink()


@pytest.mark.parametrize("damage", ["", "{", "[]", '"text"', "null"])
def test_a_damaged_file_is_measured_anew(measured: Path, damage: str) -> None:
    measured.write_text(damage)
    assert measured_peak("cpu", "float32") > 0
    assert json.loads(measured.read_text())


def test_choices_among_other_kernels_are_measured_anew(measured: Path) -> None:
    chosen = choose("cpu", "int32", 8, 8, 8)
    known = json.loads(measured.read_text())
    (place,) = known.values()
    place["choices"]["int32 8 8 8"] = {"kernel": "gone", "seconds": {"gone": 1.0}}
    measured.write_text(json.dumps(known))
    tuning._memory.clear()
    assert choose("cpu", "int32", 8, 8, 8).name in KERNELS
    assert chosen.name in CPU


def test_a_folder_that_cannot_be_written_costs_only_time(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured.parent.joinpath("file").touch()
    monkeypatch.setenv("PIPELINE_DATA_DIR", str(measured.parent / "file"))
    pipeline_settings.cache_clear()
    assert choose("cpu", "int64", 8, 8, 8).name in CPU


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_peak_is_a_measured_figure_and_no_product_exceeds_it(measured: Path, dtype: str) -> None:
    peak = measured_peak("cpu", dtype)
    assert 0 < peak < 1e6
    assert tuning.share_of_peak("cpu", dtype, peak / 2) == pytest.approx(0.5)
    assert tuning.share_of_peak("cpu", dtype, peak * 2) == 1.0
    assert measured_peak("cpu", dtype) == pytest.approx(peak * 2)


@given(st.integers(1, 64), st.randoms(use_true_random=False))
@settings(max_examples=64, deadline=None)
def test_a_systolic_array_takes_3n_minus_2_cycles_for_an_exact_product(n: int, random: Any) -> None:
    generator = np.random.default_rng(random.getrandbits(32))
    a, b = generator.integers(-(2**20), 2**20, (2, n, n))
    done = run(a, b)
    assert np.array_equal(done.product, a @ b)
    assert (done.cycles, done.multiply_accumulates) == (3 * n - 2, n**3)


@given(st.tuples(*[st.integers(1, 12)] * 3))
@settings(deadline=None)
def test_any_shape_takes_as_long_as_its_wavefront(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    a, b = np.arange(m * k).reshape(m, k), np.arange(k * n).reshape(k, n)
    done = run(a, b)
    assert np.array_equal(done.product, a @ b)
    assert (done.cycles, done.multiply_accumulates) == (m + n + k - 2, m * n * k)


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_the_wavefront_is_a_diagonal_band_that_crosses_the_array(n: int) -> None:
    cycles = list(wavefront(n))
    assert len(cycles) == 3 * n - 2
    distance = np.add.outer(np.arange(n), np.arange(n))
    for cycle, active in enumerate(cycles):
        assert active.dtype == bool
        assert np.array_equal(active, (distance <= cycle) & (cycle < distance + n))


def test_the_simulated_array_has_a_limit() -> None:
    with pytest.raises(ValueError, match="at most 1,048,576 cells"):
        KERNELS["systolic"].multiply(torch.ones(2000, 1), torch.ones(1, 2000))


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    code = "import sys, subscribers.kernels; print([m for m in ('numba', 'triton', 'llvmlite') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def forbidden(*_: object) -> float:
    raise AssertionError("measured again")
