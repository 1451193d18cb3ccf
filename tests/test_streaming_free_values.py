"""Free values: normal, independent of each other, and the same however they are cut."""

from concurrent.futures import ThreadPoolExecutor
from math import log
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growlib import free_values
from growlib.averages import deviation, mean_along
from growlib.free_values import FreeValues, normal, quantiles

MILLION = 1_000_000
FIXED = [[2243721169, 2667409130], [3217912890, 1593975540], [2982014935, 2107767398]]


def away_from(cdf):
    """How far the sorted values of a distribution are from it (Kolmogorov and Smirnov): sup |F_n - F| sqrt(n)."""
    n = len(cdf)
    steps = np.arange(n + 1) / n
    return max(abs(cdf - steps[1:]).max(), abs(cdf - steps[:-1]).max()) * n**0.5


RARE = 1.95  # what that exceeds once in a thousand


def drawn(seed=0, name="a", rows=1000, columns=1000):
    return normal(seed, name, rows, columns).double().numpy()


@pytest.mark.parametrize("shape", [(1, MILLION), (1000, 1000), (MILLION, 1), (125_000, 8), (7, 142_857)])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_million_are_normal_in_any_shape(shape, seed):
    values = drawn(seed, "model.layers.0.mlp.up_proj.weight", *shape).ravel()
    n = values.size
    # Each bound is four standard errors of a normal sample.
    assert abs(values.mean()) < 4 / n**0.5
    assert abs(values.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((values**3).mean()) < 4 * (15 / n) ** 0.5
    assert abs((values**4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert away_from(torch.special.ndtr(torch.from_numpy(np.sort(values))).numpy()) < RARE
    assert 4.0 < abs(values).max() < 4.4


def test_the_table_is_the_normal():
    table = quantiles().astype(np.float64)
    assert np.array_equal(table, -table[::-1])
    assert (np.diff(table) > 0).all()
    assert (table**2).mean() == pytest.approx(1, abs=1e-6)
    assert (table**4).mean() == pytest.approx(3, abs=1e-3)
    assert np.allclose(
        torch.special.ndtr(torch.from_numpy(table)).numpy(), (np.arange(1 << 16) + 0.5) / (1 << 16), atol=1e-5
    )


def largest_correlation(streams):
    """Between any two of several rows of equal length, in standard errors."""
    length = streams.shape[1]
    correlation = np.corrcoef(streams) - np.eye(len(streams))
    return abs(correlation).max() * length**0.5


def bound(pairs):
    """What the largest of so many standard normals rarely exceeds."""
    return -NormalDist().inv_cdf(0.5e-4 / pairs)


OTHERS = {
    "names": lambda: np.stack([drawn(0, f"layers.{i}", 1, 50_000)[0] for i in range(60)]),
    "seeds": lambda: np.stack([drawn(i, "layers.0", 1, 50_000)[0] for i in range(60)]),
    "rows": lambda: drawn(0, "layers.0", 200, 50_000),
    "columns": lambda: drawn(0, "layers.0", 50_000, 200).T,
    "far rows": lambda: FreeValues(0, "a").normals(np.arange(0, 60 << 32, 1 << 32), 0, 50_000).astype(float),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("of", ["values", "squares", "signs of the low bit"])
def test_independent(kind, of):
    streams = OTHERS[kind]()
    if of == "squares":
        streams = streams**2
    elif of != "values":
        streams = np.searchsorted(quantiles(), streams) % 2 - 0.5
    assert largest_correlation(streams) < bound(len(streams) ** 2 / 2)


@pytest.mark.parametrize("length", [997, 1024, 4096])
def test_no_period_and_no_line_along_rows_or_columns(length):
    """The spectrum of a block is flat, and a row is not a shift of another."""
    block = drawn(3, "b", length, length)
    power = abs(np.fft.fft2(block)) ** 2 / block.size
    assert power.max() < log(block.size / 1e-4)  # each is exponential; one half mirrors the other
    assert away_from(1 - np.exp(-np.sort(power[1 : length // 2].ravel()))) < RARE


def test_no_row_comes_twice():
    rows = FreeValues(0, "a").words(np.arange(200_000), 0, 4)
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_each_bit_of_a_word_is_fair_and_none_follows_another():
    words = FreeValues(1, "bits").words(np.arange(300), 0, 1000).ravel()
    bits = (words[:, None] >> np.arange(32, dtype=np.uint32) & 1).astype(float)
    assert abs(bits.mean(0) - 0.5).max() < 5 * 0.5 / len(words) ** 0.5
    assert largest_correlation(bits.T) < bound(32**2 / 2)


@given(
    st.integers(0, 2**63),
    st.lists(st.integers(0, 2**40), min_size=1, max_size=9),
    st.tuples(st.integers(0, 150_000), st.integers(1, 3000)),
    st.integers(1, 3000),
)
def test_any_block_can_be_drawn_by_itself(seed, rows, columns, cut):
    stream, rows, (first, width) = FreeValues(seed, "a"), np.array(rows), columns
    whole = stream.normals(rows, first, first + width)
    cut = min(cut, width)
    parts = [stream.normals(rows, first, first + cut), stream.normals(rows, first + cut, first + width)]
    assert np.array_equal(whole, np.concatenate(parts, axis=1))
    assert np.array_equal(whole[::-1], stream.normals(rows[::-1], first, first + width))
    assert np.array_equal(whole[:1], stream.normals(rows[:1], first, first + width))


@pytest.mark.parametrize("tile", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("kept", [0, 10, 1 << 15])
def test_buffers_change_nothing(tile, kept, monkeypatch):
    rows = np.arange(40, 60)
    expected = FreeValues(0, "a").normals(rows, 33, 190)
    monkeypatch.setattr(free_values, "TILE", tile)
    monkeypatch.setattr(free_values, "KEPT", kept)
    assert np.array_equal(FreeValues(0, "a").normals(rows, 33, 190), expected)


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_threads_change_nothing(threads):
    expected = drawn(0, "a", 64, 5000)
    with ThreadPoolExecutor(threads) as pool:
        rows = pool.map(lambda row: FreeValues(0, "a").normals(np.array([row]), 0, 5000), range(64))
        assert np.array_equal(np.concatenate(list(rows)), expected)


def test_in_another_precision_they_are_the_same_rounded():
    half = quantiles().astype(np.float16)
    values = FreeValues(0, "a").normals(np.arange(5), 3, 900, half)
    assert values.dtype == np.float16
    assert np.array_equal(values, FreeValues(0, "a").normals(np.arange(5), 3, 900).astype(np.float16))


def test_these_are_the_values():
    """A seed is a promise: the same values in every version."""
    words = FreeValues(0, "a").words(np.array([0, 1, 1 << 40]), 100_000, 100_002)
    assert words.tolist() == FIXED
    assert np.array_equal(
        FreeValues(0, "a").normals(np.array([0]), 200_001, 200_002)[0, 0], quantiles()[FIXED[0][0] >> 16]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("threads", [1, 2, 8])
def test_means_and_deviations_are_the_same_on_any_number_of_threads(dtype, threads):
    values = normal(0, "a", 300, 1500).to(dtype) + 3
    before = values.clone()
    expected = [values.double().std(correction=0), *(values.double().mean(dim, keepdim=True) for dim in (0, 1))]
    results, known = [], torch.get_num_threads()
    for count in (1, threads):
        torch.set_num_threads(count)
        results.append([torch.tensor(deviation(values)), mean_along(values, 0), mean_along(values, 1)])
    torch.set_num_threads(known)
    assert torch.equal(values, before)
    for one, other, right in zip(*results, expected, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one.double(), right, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)


@pytest.mark.parametrize("value", [0.0, 0.3, -1e6])
def test_the_deviation_of_equal_values_is_zero(value):
    assert deviation(torch.full((300, 400), value)) == 0.0
    assert deviation(torch.zeros(0)) == 0.0
