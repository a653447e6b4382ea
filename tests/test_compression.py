"""Compression: what a codec loses is bounded and comes later, sums are the sums of what was said, nothing hides."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import Tensor
from pipeline.catalog.compression import BLOCK, CODECS, Encoder, check_codec, decode, merge, nbytes_of
from pipeline.errors import ConfigurationError

LOSSY = ("bf16", "fp16", "int8", "topk:0.1", "powersgd:2")
ALL = ("none", *LOSSY)
SIZES = st.integers(1, 3 * BLOCK + 5)


def vectors(size: int, largest: float = 1e4) -> st.SearchStrategy[np.ndarray]:
    """Values from 0 and the smallest float32 to the largest, many of them equal."""
    return hnp.arrays(np.float32, size, elements=st.floats(-largest, largest, width=32), fill=st.just(0.0))


def matrices(size: int) -> dict[int, tuple[int, int]]:
    """Two in a vector of `size` values, with something between and after them."""
    side = int((size / 3) ** 0.5)
    return {1: (side, side), 3 + side * side: (2 * side // 3, side)} if side > 2 else {}


def encoder(codec: str, size: int) -> Encoder:
    return Encoder(codec, size, matrices(size))


def normal(size: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32) * np.float32(scale)


# -- one vector ----------------------------------------------------------------------------------------------------


BOUNDS: dict[str, Callable[[np.ndarray], Any]] = {
    "none": lambda vector: 0.0,
    "bf16": lambda vector: np.abs(vector) * 2.0**-8 + 2.0**-134,
    "fp16": lambda vector: np.maximum(np.abs(vector) * 2.0**-11, 2.0**-25),
    "int8": lambda vector: np.abs(vector).max() / 253 + 1e-30,
}


@pytest.mark.parametrize("codec", BOUNDS)
@given(vector=SIZES.flatmap(vectors))
@settings(max_examples=15, deadline=None)
def test_every_value_comes_back_within_the_codecs_precision(codec: str, vector: np.ndarray) -> None:
    said = decode(codec, encoder(codec, len(vector)).encode(vector), len(vector))
    assert said.dtype == np.float32
    assert (np.abs(said.astype(np.float64) - vector) <= BOUNDS[codec](vector)).all()


def test_fp16_is_numpys_to_the_bit_and_bf16_torchs_but_for_ties() -> None:
    with np.errstate(invalid="ignore"):
        halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves = np.sort(halves[np.isfinite(halves)])
    between = (halves[1:] + halves[:-1]) / 2
    vector = np.concatenate([halves, between, np.nextafter(between, np.inf), np.nextafter(between, -np.inf)])
    said = decode("fp16", Encoder("fp16", len(vector)).encode(vector), len(vector))
    assert np.array_equal(said, vector.astype(np.float16).astype(np.float32))

    vector = np.concatenate([normal(5000, 1, 1e-20), normal(5000, 2), normal(5000, 3, 1e20)])
    said = decode("bf16", Encoder("bf16", len(vector)).encode(vector), len(vector))
    ties = (vector.view(np.uint32) & 0xFFFF) == 0x8000
    torchs = torch.from_numpy(vector).bfloat16().float().numpy()
    assert np.array_equal(said[~ties], torchs[~ties])
    assert not ties.all()


@given(vector=SIZES.flatmap(vectors), share=st.floats(0.01, 1.0))
@settings(max_examples=15, deadline=None)
def test_top_k_says_the_largest_exactly_and_only_those(vector: np.ndarray, share: float) -> None:
    parts = Encoder(f"topk:{share}", len(vector)).encode(vector)
    indices, values = (np.asarray(parts[name]) for name in ("indices", "values"))
    assert np.array_equal(values, vector[indices])
    unsaid = np.delete(vector, indices)
    if unsaid.size and indices.size:
        assert np.abs(unsaid).max() <= np.abs(values).min()
    assert len(indices) <= 2 * max(1, round(share * len(vector)))
    assert indices.size or np.abs(vector).max() <= np.finfo(np.float32).tiny


def test_top_k_of_a_big_vector_says_about_its_share() -> None:
    vector = normal(1_000_000) ** 3
    encoder = Encoder("topk:0.01", len(vector))
    counts = [len(encoder.encode(vector)["values"]) for _ in range(5)]
    assert 7_000 < counts[0] < 14_000
    assert all(5_000 < count < 20_000 for count in counts)


@given(rank=st.integers(1, 4), rows=st.integers(12, 60), columns=st.integers(12, 60), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_powersgd_says_a_matrix_of_its_rank_exactly(rank: int, rows: int, columns: int, seed: int) -> None:
    matrix = normal(rows * rank, seed).reshape(rows, rank) @ normal(rank * columns, seed + 1).reshape(rank, columns)
    vector = np.concatenate([normal(5), matrix.reshape(-1), normal(7)])
    parts = Encoder(f"powersgd:{rank}", len(vector), {5: (rows, columns)}).encode(vector)
    np.testing.assert_allclose(decode("powersgd", parts, len(vector)), vector, atol=1e-4 * np.abs(vector).max())
    assert nbytes_of(parts) == 4 * (rank * (rows + columns) + 12)


def test_powersgd_finds_the_strongest_directions_of_a_matrix_it_sees_again() -> None:
    """Warm start: subspace iteration comes close to the best approximation of its rank."""
    left, right = (np.linalg.qr(normal(80 * 80, seed).reshape(80, 80))[0] for seed in (1, 2))
    matrix = (left * 0.7 ** np.arange(80)) @ right.T
    encoder = Encoder("powersgd:3", 6400, {0: (80, 80)})
    for _ in range(30):
        said = decode("powersgd", encoder.encode(matrix.reshape(-1).astype(np.float32)), 6400)
        encoder.error[:] = 0
    best = np.linalg.norm(0.7 ** np.arange(3, 80))
    assert np.linalg.norm(said.reshape(80, 80) - matrix) < 1.05 * best


def test_powersgd_goes_on_after_a_matrix_of_zeros() -> None:
    """Also where the directions it starts from then are rows that stay zero."""
    matrix = np.zeros((30, 30), np.float32)
    encoder = Encoder("powersgd:1", 900, {0: (30, 30)})
    for _ in range(3):
        encoder.encode(matrix.reshape(-1))
    matrix[20:] = normal(300).reshape(10, 30)
    said = sum(decode("powersgd", encoder.encode(matrix.reshape(-1)), 900) for _ in range(40)) / 40
    assert np.linalg.norm(said.reshape(30, 30) - matrix) < 0.25 * np.linalg.norm(matrix)


# -- one after the other -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", LOSSY)
@given(size=SIZES, seed=st.integers(0, 1000), scale=st.floats(-6, 3))
@settings(max_examples=15, deadline=None)
def test_what_was_said_and_what_is_remembered_is_the_true_sum(codec: str, size: int, seed: int, scale: float) -> None:
    sent, total, said = encoder(codec, size), np.zeros(size), np.zeros(size)
    for turn in range(12):
        vector = normal(size, seed + turn, 10.0**scale)
        before = vector.copy()
        said += decode(codec, sent.encode(vector), size)
        total += before
        assert np.array_equal(vector, before), "the caller's vector was changed"
    np.testing.assert_allclose(said + sent.error, total, atol=2e-5 * 10.0**scale)


@pytest.mark.parametrize("codec", LOSSY)
def test_over_time_the_mean_of_what_was_said_is_the_true_mean(codec: str) -> None:
    size, turns = 40 * BLOCK, 200
    sent, vector, said = encoder(codec, size), normal(size), np.zeros(size)
    for _ in range(turns):
        said += decode(codec, sent.encode(vector), size)
    most = {"topk:0.1": 0.1, "powersgd:2": 0.4}.get(codec, 1e-4)
    assert np.linalg.norm(said / turns - vector) < most * np.linalg.norm(vector)
    assert np.linalg.norm(said + sent.error - turns * vector) < 1e-4 * turns * np.linalg.norm(vector)


def test_fp16_says_later_what_is_beyond_its_range() -> None:
    sent = Encoder("fp16", 2)
    said = [decode("fp16", sent.encode(np.float32([1e5, 1.0])), 2)]
    said += [decode("fp16", sent.encode(np.zeros(2, np.float32)), 2) for _ in range(3)]
    assert said[0].tolist() == [65504.0, 1.0]
    assert sum(said).tolist() == [1e5, 4.0 / 4]


@pytest.mark.parametrize("codec", ["bf16", "fp16", "int8"])
def test_no_temporary_is_as_large_as_the_vector(codec: str) -> None:
    size = 4_000_000
    sent, vector = Encoder(codec, size), normal(size)
    sent.encode(vector)
    tracemalloc.start()
    parts = sent.encode(vector)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < nbytes_of(parts) + 2_000_000


# -- sums ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ALL)
@given(size=SIZES, seed=st.integers(0, 1000), weights=st.lists(st.floats(0.1, 3.0), min_size=1, max_size=4))
@settings(max_examples=15, deadline=None)
def test_a_merged_sum_is_the_sum_of_what_was_said(codec: str, size: int, seed: int, weights: list[float]) -> None:
    parts = [encoder(codec, size).encode(normal(size, seed + rank)) for rank in range(len(weights))]
    summands = [(weight, codec, part) for weight, part in zip(weights, parts, strict=True)]
    merged_as, merged, bad = merge(summands, size)
    expected = sum(weight * decode(codec, part, size).astype(np.float64) for weight, _, part in summands)
    rounding = {"bf16": 2.0**-8, "int8": 2.0**-8, "fp16": 2.0**-11}.get(codec, 0)
    assert bad == []
    assert merged_as == {"int8": "bf16"}.get(codec, codec.partition(":")[0])
    found = decode(merged_as, merged, size)
    assert (np.abs(found - expected) <= np.abs(expected) * rounding + 3e-5).all()
    assert merge(summands, size) == (merged_as, merged, bad), "the same summands gave other bits"


def test_a_sum_of_different_codecs_is_exact() -> None:
    parts = [(1.0, codec, encoder(codec, 500).encode(normal(500, seed))) for seed, codec in enumerate(ALL)]
    merged_as, merged, bad = merge(parts, 500)
    expected = sum(decode(codec, part, 500).astype(np.float64) for _, codec, part in parts)
    assert (merged_as, bad) == ("none", [])
    np.testing.assert_allclose(decode("none", merged, 500), expected, atol=1e-5)


def test_factors_of_different_matrices_are_summed_as_what_they_stand_for() -> None:
    """For a higher rank fewer matrices are worth it."""
    shapes = {0: (5, 5), 25: (40, 40)}
    parts = [(0.5, name, Encoder(name, 1625, shapes).encode(normal(1625))) for name in ("powersgd:2", "powersgd:4")]
    assert "p0" in parts[0][2]
    assert "p0" not in parts[1][2]
    merged_as, merged, bad = merge(parts, 1625)
    expected = sum(np.float32(weight) * decode(codec, part, 1625) for weight, codec, part in parts)
    assert (merged_as, bad) == ("none", [])
    np.testing.assert_allclose(decode("none", merged, 1625), expected, atol=1e-5)


def test_sums_are_taken_in_the_order_given() -> None:
    vectors = [np.float32([1e8]), np.float32([1.0]), np.float32([-1e8])]
    sums = {
        order: decode("none", merge([(1.0, "none", {"values": Tensor(vectors[at])}) for at in order], 1)[1], 1)[0]
        for order in ((0, 1, 2), (0, 2, 1))
    }
    assert sums == {(0, 1, 2): 0.0, (0, 2, 1): 1.0}


# -- not finite ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("codec", ALL)
def test_a_vector_that_is_not_finite_is_found_and_left_out_and_not_remembered(codec: str, poison: float) -> None:
    size = BLOCK + 100
    good, poisoned = encoder(codec, size), encoder(codec, size)
    vector = normal(size)
    poisoned.encode(vector)
    before = None if poisoned.error is None else poisoned.error.copy()
    sick = vector.copy()
    sick[size // 2] = poison
    parts = poisoned.encode(sick)
    merged_as, merged, bad = merge([(0.25, codec, parts), (0.75, codec, good.encode(vector))], size)
    assert bad == [0]
    alone = merge([(1.0, codec, encoder(codec, size).encode(vector))], size)[1]
    np.testing.assert_array_equal(decode(merged_as, merged, size), decode(merged_as, alone, size))
    assert np.array_equal(before, poisoned.error) if before is not None else poisoned.error is None
    assert np.isfinite(decode(codec, poisoned.encode(vector), size)).all()
    assert merge([(1.0, codec, parts)], size) == ("none", {}, [0])


@pytest.mark.parametrize("largest", [1e9, 1e30, 9e35, 1e36, 3.4e38])
@pytest.mark.parametrize("codec", LOSSY)
def test_after_one_spike_what_is_said_is_what_is_meant_again(codec: str, largest: float) -> None:
    """In a value, a row, or all: fp16 says what it can with two vectors, and what is too large counts for nothing."""
    size = 40 * 40 + 10
    for spiked in (slice(5, 6), slice(41, 81), slice(None)):
        sent, spike, vector = Encoder(codec, size, {0: (40, 40)}), np.zeros(size, np.float32), normal(size)
        spike[spiked] = largest
        [*_, bad] = merge([(1.0, codec, sent.encode(spike))], size)
        assert bad == [0] if largest >= 1e36 else codec.startswith("powersgd") or bad == []
        said = [decode(codec, sent.encode(vector), size) for _ in range(3)]
        assert np.isfinite(said).all()
        assert np.isfinite(sent.error).all()
        if codec == "fp16":
            assert said[-1] == pytest.approx(vector, abs=0.01)


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800000, 0xFF800000])
def test_no_kind_of_nan_hides(bits: int) -> None:
    """Rounded carelessly, some of them become 0."""
    nan = np.array([bits], np.uint32).view(np.float32)
    high = np.array([bits >> 16 | 0x40], np.uint16)
    hostile = [
        ("none", {"values": Tensor(nan)}),
        ("bf16", {"values": Tensor.from_buffer(high.tobytes(), "bfloat16", (1,))}),
        ("int8", {"values": Tensor(np.ones(1, np.int8)), "scales": Tensor(nan)}),
        ("topk", {"indices": Tensor(np.zeros(1, np.uint32)), "values": Tensor(nan)}),
        ("powersgd", {"rest": Tensor(nan)}),
    ]
    for codec, parts in hostile:
        honest = Encoder(codec, 1).encode(np.ones(1, np.float32))
        assert merge([(1.0, codec, honest), (1.0, codec, parts)], 1)[2] == [1], codec


def test_a_sum_that_overflows_is_nobodys() -> None:
    parts = {"values": Tensor(np.float32([3e38]))}
    assert merge([(1.0, "none", parts), (1.0, "none", parts)], 1) == ("none", {}, [0, 1])


# -- hostile parts -------------------------------------------------------------------------------------------------


def good_parts(codec: str) -> dict[str, Tensor]:
    return encoder(codec, 600).encode(normal(600))


MUTATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "shorter": lambda tensor: Tensor(np.asarray(tensor)[:-1]),
    "flat": lambda tensor: Tensor(np.asarray(tensor).reshape(1, -1)),
    "another dtype": lambda tensor: Tensor(np.asarray(tensor).astype(np.float64)),
    "a number": lambda tensor: Tensor(np.float32(1.0)),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("codec", ALL)
def test_parts_of_another_form_are_refused(codec: str, mutation: str) -> None:
    parts = good_parts(codec)
    for name in parts:
        wrong = {**parts, name: MUTATIONS[mutation](parts[name])}
        with pytest.raises(ValueError, match=r"expected|do not fit"):
            decode(codec, wrong, 600)
        with pytest.raises(ValueError, match=r"expected|do not fit"):
            merge([(1.0, codec, wrong)], 600)
    with pytest.raises(ValueError, match="expected"):
        decode(codec, {}, 600)
    with pytest.raises(ValueError, match="expected parts"):
        decode(codec, {**parts, "more": Tensor(np.zeros(1))}, 600)


@pytest.mark.parametrize(
    ("codec", "parts", "why"),
    [
        ("topk", {"indices": np.uint32([1, 600]), "values": np.float32([1, 1])}, "index 600 is outside of 600 values"),
        ("topk", {"indices": np.uint32([700, 1]), "values": np.float32([1, 1])}, "ascending"),
        ("topk", {"indices": np.uint32([5, 5]), "values": np.float32([1, 1])}, "each once"),
        ("powersgd", {"p0": np.ones((100, 1)), "q0": np.ones((100, 1)), "rest": np.ones(0)}, "do not fit at 0 of 600"),
        ("powersgd", {"p5": np.ones((20, 1)), "q5": np.ones((29, 2)), "rest": np.ones(20)}, r"p \[m, r\]"),
        ("powersgd", {"p007": np.ones((2, 1)), "q007": np.ones((2, 1)), "rest": np.ones(596)}, "expected parts p7"),
        ("powersgd", {"p٣": np.ones((2, 1)), "q٣": np.ones((2, 1)), "rest": np.ones(596)}, "expected parts rest"),
        (
            "powersgd",
            {"p0": np.ones((9, 1)), "q0": np.ones((9, 1)), "p80": np.ones((2, 1)), "q80": np.ones((2, 1)), "rest": 0},
            "do not fit at 80",
        ),
        ("powersgd", {"p0": np.ones((0, 1)), "q0": np.ones((5, 1)), "rest": np.ones(600)}, "do not fit at 0"),
    ],
)  # fmt: skip
def test_parts_that_would_reach_outside_are_refused(codec: str, parts: dict[str, Any], why: str) -> None:
    keep = {
        name: Tensor(part if np.asarray(part).dtype == np.uint32 else np.float32(part)) for name, part in parts.items()
    }
    with pytest.raises(ValueError, match=why):
        decode(codec, keep, 600)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_are_numbers_above_zero(weight: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        merge([(weight, "none", good_parts("none"))], 600)


@pytest.mark.parametrize(
    "name", ["zip", "", "topk:0", "topk:1.5", "topk:x", "topk:nan", "powersgd:0", "powersgd:1.5", "int8:4", "bf16:"]
)
def test_unknown_codecs_are_refused_with_a_list_of_the_known(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"use none, bf16, fp16, int8, topk:SHARE \(0 to 1\) or powersgd:RANK"):
        Encoder(name, 10)


def test_every_codec_has_a_name_that_is_accepted() -> None:
    assert [check_codec(name) for name in CODECS] == list(CODECS)


def test_an_encoder_takes_float32_of_its_size_and_matrices_that_fit() -> None:
    with pytest.raises(ValueError, match=r"expected float32 \[3\], not float64 \[3\]"):
        Encoder("int8", 3).encode(np.zeros(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"not float32 \[4\]"):
        Encoder("int8", 3).encode(np.zeros(4, np.float32))
    with pytest.raises(ValueError, match="at least one value"):
        Encoder("int8", 0)
    for wrong in ({0: (4, 4), 15: (2, 2)}, {90: (4, 4)}, {-1: (4, 4)}, {0: (0, 3)}):
        with pytest.raises(ValueError, match="overlaps another or does not fit"):
            Encoder("powersgd:1", 100, wrong)
