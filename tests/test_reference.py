"""The reference against cases done by hand and against the formulas as written."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from checks import (
    DTYPES,
    bits,
    exact_ffn_1,
    exact_ffn_4,
    exact_ffn_12,
    exact_ffn_23,
    gate,
    norm_weight,
    token,
    ulp,
    weights,
)

from prosparse_cupy import reference

F = np.float32


def test_fatrelu_by_hand():
    values = np.array([-1.0, -0.0, 0.0, 0.009, 0.01, 0.5, np.inf, -np.inf], F)
    np.testing.assert_array_equal(reference.fatrelu(values, 0.01), np.array([0, 0, 0, 0, 0.01, 0.5, np.inf, 0], F))
    np.testing.assert_array_equal(reference.fatrelu(values), np.array([0, 0, 0, 0.009, 0.01, 0.5, np.inf, 0], F))
    assert np.isnan(reference.fatrelu(np.array([np.nan], F), 0.5))
    assert not np.signbit(reference.fatrelu(np.array([-1.0, -0.0], F))).any()


def test_the_threshold_is_compared_as_float32():
    assert reference.active(np.array([0.1], F), 0.1)  # float64(0.1) is below float32(0.1), but so is no float32
    assert not reference.active(np.array([np.nextafter(F(0.1), F(0))], F), 0.1)


def test_the_ffn_by_hand():
    x = np.array([1.0, 2.0], F)
    w_gate = np.array([[1, 1], [-1, 0], [0, 0.5]], F)  # gate 3, -1, 1
    w_up = np.array([[2, 1], [np.nan, 0], [1, -1]], F)  # 4, unread, -1
    w_down_t = np.array([[1, 0, 1], [np.nan] * 3, [0, 2, 1]], F)
    np.testing.assert_array_equal(reference.ffn_1(x, w_gate), [3, -1, 1])
    np.testing.assert_array_equal(reference.ffn_23(np.array([3, -1, 1], F), x, w_up), [12, 0, -1])
    np.testing.assert_array_equal(reference.ffn_4(np.array([12, 0, -1], F), w_down_t), [12, -2, 11])
    np.testing.assert_array_equal(reference.sparse_ffn(x, w_gate, w_up, w_down_t), [12, -2, 11])
    np.testing.assert_array_equal(reference.sparse_ffn(x, w_gate, w_up, w_down_t, threshold=2.0), [12, 0, 12])


def test_each_formula_rounds_once():
    x = np.array([1.0, 2.0**-9], DTYPES["bfloat16"])
    w = np.array([[1, 1], [1, 3]], DTYPES["bfloat16"])  # 1 + 2**-9 rounds to 1; 1 + 3 * 2**-9 to 1 + 2**-7
    np.testing.assert_array_equal(reference.ffn_1(x, w).astype(F), [1.0, 1 + 2**-7])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0, "one"])
@pytest.mark.parametrize("threshold", [0.0, 0.25])
def test_against_the_formulas(dtype, sparsity, threshold):
    rng = np.random.default_rng(11)
    d_ff, d_model = 2500, 72
    x, w = token(d_model, dtype, rng), weights(d_ff, d_model, dtype)
    g = gate(d_ff, dtype, sparsity, rng, threshold)
    x1 = reference.ffn_23(g, x, w, threshold)
    for out, (exact, _) in [
        (reference.ffn_1(x, w), exact_ffn_1(x, w)),
        (x1, exact_ffn_23(g, x, w, threshold)),
        (reference.ffn_4(x1, w), exact_ffn_4(x1, w)),
    ]:
        assert out.dtype == DTYPES[dtype]
        assert np.all(np.abs(out.astype(np.float64) - exact) <= 0.5001 * ulp(exact, out.dtype))


def test_other_formulas_by_hand():
    x = np.array([1.0, 2.0], F)
    w_gate = np.array([[1, 1], [-1, 0], [0, 0.5]], F)  # gate 3, -1, 1
    w_up = np.array([[2, 1], [np.nan, 0], [1, -1]], F)  # 4, unread, -1
    w_down_t = np.array([[1, 0, 1], [np.nan] * 3, [0, 2, 1]], F)
    up_bias, down_bias = np.array([1, np.nan, -2], F), np.array([0.5, 0, -1], F)
    gate = np.array([3, -1, 1], F)
    np.testing.assert_array_equal(reference.ffn_1(x, w_gate, bias=np.array([-3, 3, 1], F)), [0, 2, 2])
    np.testing.assert_array_equal(reference.ffn_12(x, w_gate, activation="relu2"), [9, 0, 1])
    np.testing.assert_array_equal(reference.ffn_12(x, w_gate, 2.0, bias=np.array([0, 4, 0.5], F)), [3, 3, 0])
    np.testing.assert_array_equal(reference.ffn_23(gate, x, w_up, activation="relu2"), [36, 0, -1])
    np.testing.assert_array_equal(reference.ffn_23(gate, x, w_up, activation="drelu"), [12, 0, 0])
    np.testing.assert_array_equal(reference.ffn_23(gate, x, w_up, bias=up_bias), [15, 0, -3])
    x1 = np.array([12, 0, -1], F)
    np.testing.assert_array_equal(reference.ffn_4(x1, w_down_t, bias=down_bias), [12.5, -2, 10])
    # The mean of the squares is 145 / 3; with 7 more it is 166 / 3.
    norm = np.array([2, np.nan, 1], F)
    y = reference.ffn_4(x1, w_down_t, bias=down_bias, norm_weight=norm, norm_eps=7.0)
    np.testing.assert_allclose(y, np.array([24, -2, 23]) / np.sqrt(166 / 3) + down_bias, rtol=1e-6)
    y = reference.sparse_ffn(x, None, w_gate, np.eye(3, dtype=F), activation="relu2", down_bias=down_bias)
    np.testing.assert_array_equal(y, [9.5, 0, 0])


def test_a_norm_of_nothing_is_nothing():
    x1, w, bias = np.zeros(3, F), np.full((3, 4), np.nan, F), np.arange(4, dtype=F)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for eps in (0.0, 1e-5):
            options = {"norm_weight": np.full(3, np.nan, F), "norm_eps": eps}
            np.testing.assert_array_equal(reference.ffn_4(x1, w, **options), np.zeros(4, F))
            np.testing.assert_array_equal(reference.ffn_4(x1, w, bias=bias, **options), bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.9, 1.0, "one"])
def test_other_formulas_against_their_truths(dtype, sparsity):
    rng, threshold = np.random.default_rng(12), 0.25
    d_ff, d_model = 700, 72
    x, w, bias = token(d_model, dtype, rng), weights(d_ff, d_model, dtype), token(d_ff, dtype, rng)
    g, norm, down_bias = gate(d_ff, dtype, sparsity, rng, threshold), norm_weight(d_ff, dtype, rng), token(d_model, dtype, rng)
    pairs = [(reference.ffn_1(x, w, bias=bias), exact_ffn_1(x, w, bias)[0])]
    for activation in ("relu", "relu2", "drelu"):
        for b in (None, bias):
            x1 = reference.ffn_23(g, x, w, threshold, activation=activation, bias=b)
            pairs.append((x1, exact_ffn_23(g, x, w, threshold, activation, b)[0]))
            assert not bits(x1[~reference.active(g, threshold)]).any()
            if activation != "drelu":
                half = reference.ffn_12(x, w, threshold, activation=activation, bias=b)
                expected = exact_ffn_12(reference.ffn_1(x, w, bias=b), x, w, threshold, activation, b)
                np.testing.assert_array_equal(bits(half), bits(expected))
    for b, n, eps in [(down_bias, None, 0.0), (None, norm, 0.0), (down_bias, norm, 1e-5)]:
        pairs.append((reference.ffn_4(g, w, bias=b, norm_weight=n, norm_eps=eps), exact_ffn_4(g, w, b, n, eps)[0]))
    for out, exact in pairs:
        assert out.dtype == DTYPES[dtype]
        assert np.all(np.abs(out.astype(np.float64) - exact) <= 0.5001 * ulp(exact, out.dtype))


def test_a_leading_token_dim_is_kept():
    rng = np.random.default_rng(0)
    x, w = token(16, "float32", rng), weights(50, 16, "float32")
    y = reference.sparse_ffn(x, w, w, w)
    np.testing.assert_array_equal(reference.sparse_ffn(x[None], w, w, w), y[None])


def test_pack_down_is_a_contiguous_transpose():
    w = weights(6, 16, "bfloat16")
    packed = reference.pack_down(w)
    assert packed.flags.c_contiguous
    np.testing.assert_array_equal(packed, w.T)
