"""The measurements' float64 truth against the formulas as written. Every number of the benchmarks is held against it."""

from __future__ import annotations

import numpy as np
import pytest
from checks import DTYPES, exact_activation, exact_ffn_1, exact_ffn_4, exact_ffn_23, gate, norm_weight, token, weights

from prosparse_cupy import reference
from prosparse_cupy.testing import truth


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.5, 1.0, "one"])
def test_formulas(dtype, sparsity):
    rng, d_ff, d_model, threshold = np.random.default_rng(), 3000, 40, 0.25
    x, w, g = token(d_model, dtype, rng), weights(d_ff, d_model, dtype), gate(d_ff, dtype, sparsity, rng, threshold)
    on = reference.active(g, threshold)
    w = np.where(on[:, None], w, np.array(np.nan, w.dtype))
    for activation in ("relu", "relu2", "drelu"):
        exact, _ = exact_ffn_23(g, x, w, threshold, activation)
        np.testing.assert_allclose(truth.up(g, w, x, on, activation=activation), exact, rtol=1e-6, atol=1e-12)
        if activation != "drelu":
            found = truth.half(g, activation, on)
            np.testing.assert_allclose(found, exact_activation(g, threshold, activation), rtol=1e-6)
    np.testing.assert_array_equal(truth.up(g, w, x, on), truth.up(g, w, x, on, activation="relu"))
    np.testing.assert_allclose(truth.dot(w[on], x), exact_ffn_1(x, w[on])[0], rtol=1e-9, atol=1e-12)
    x1, norm = np.where(on, g, np.zeros_like(g)), norm_weight(d_ff, dtype, rng)
    np.testing.assert_allclose(truth.down(x1, w), exact_ffn_4(x1, w)[0], rtol=1e-9, atol=1e-12)
    y = truth.down(x1, w, norm_weight=norm, norm_eps=1e-5)
    np.testing.assert_allclose(y, exact_ffn_4(x1, w, None, norm, 1e-5)[0], rtol=1e-9, atol=1e-12)
