"""ffn_12: the first half of an FFN without a gate, on the GPU and through the reference."""

from __future__ import annotations

import numpy as np
import pytest
from checks import (
    DTYPES,
    SMALL,
    assert_no_worse_than_vendor,
    assert_rounded_sum,
    bits,
    exact_activation,
    exact_ffn_12,
    poisoned,
    token,
    weights,
)
from gpu_arrays import OnCupy, OnTorch, exact_mv, large_weights, vendor_mv

import prosparse_cupy as psc
from prosparse_cupy import reference

on = OnCupy()
activations = pytest.mark.parametrize("activation", ["relu", "relu2"])


@activations
@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_arrays_run_the_reference(dtype, activation):
    rng = np.random.default_rng()
    x, w, bias = token(264, dtype, rng), weights(101, 264, dtype), token(101, dtype, rng)
    for threshold in (0.0, 0.25):
        for b in (None, bias):
            out = poisoned(101, dtype)
            assert psc.ffn_12(x, w, threshold, activation=activation, bias=b, out=out) is out
            g = psc.ffn_1(x, w, bias=b)
            np.testing.assert_array_equal(bits(out), bits(exact_ffn_12(g, x, w, threshold, activation, b)))
            again = psc.ffn_12(x[None], w, threshold, activation=activation, bias=b, specialize=False)
            np.testing.assert_array_equal(bits(again), bits(out[None]))
    assert 10 < np.count_nonzero(out) < 90


@pytest.mark.gpu
@pytest.mark.parametrize("specialize", [True, False], ids=["specialised", "dynamic"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ffn_1_and_the_activation_to_the_bit(dtype, specialize):
    rng = np.random.default_rng()
    for d_model, d_ff in SMALL:
        x, w, bias = token(d_model, dtype, rng), weights(d_ff, d_model, dtype), token(d_ff, dtype, rng)
        arrays = on.put(x), on.put(w)
        for activation, b in (("relu", None), ("relu", bias), ("relu2", None), ("relu2", bias)):
            given = None if b is None else on.put(b)
            g = on.get(psc.ffn_1(*arrays, bias=given))
            for threshold in (0.0, 0.25, max(0.0, float(g.max()))):
                out, options = on.put(poisoned(d_ff, dtype)), {"activation": activation, "bias": given}
                assert psc.ffn_12(*arrays, threshold, **options, out=out, specialize=specialize) is out
                expected = exact_ffn_12(g, x, w, threshold, activation, b)
                np.testing.assert_array_equal(bits(on.get(out)), bits(expected))


@pytest.mark.gpu
@pytest.mark.parametrize(("d_model", "d_ff", "dtype"), [(2560, 18432, "bfloat16"), (3072, 9216, "float16")])
def test_squared_relu_of_real_models_is_no_worse_than_the_vendor(d_model, d_ff, dtype, torch):
    to = OnTorch()
    x, w = to.put(token(d_model, dtype, np.random.default_rng())), large_weights(d_ff, d_model, dtype)
    exact, magnitude = exact_mv(w, x)
    g = to.get(psc.ffn_1(x, w))
    assert_rounded_sum(g, exact, magnitude, d_model)
    first = to.get(psc.ffn_12(x, w, activation="relu2", out=to.put(poisoned(d_ff, dtype))))
    np.testing.assert_array_equal(bits(first), bits(exact_activation(g, 0.0, "relu2").astype(g.dtype)))
    dense = to.get(torch.relu(vendor_mv(w, x)).square())
    assert_no_worse_than_vendor(first, dense, np.square(np.maximum(exact, 0)))
    np.testing.assert_array_equal(bits(first), bits(to.get(psc.ffn_12(x, w, activation="relu2"))))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_boundaries_and_special_values(dtype):
    """What is at the threshold is kept, NaN is active, -0 is not; squares overflow as they do in float32."""
    t = np.array(0.3).astype(DTYPES[dtype])
    neighbours = (t.view(f"i{t.itemsize}") + np.arange(-2, 3)).astype(f"i{t.itemsize}").view(DTYPES[dtype])
    special = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, 300.0], np.float32).astype(DTYPES[dtype])
    g = np.concatenate([neighbours, special])
    x, w = np.eye(8, dtype=DTYPES[dtype])[0], np.zeros((len(g), 8), DTYPES[dtype])
    w[:, 0] = g
    for threshold in (0.0, float(t)):
        for activation in ("relu", "relu2"):
            out = on.get(psc.ffn_12(on.put(x), on.put(w), threshold, activation=activation))
            with np.errstate(over="ignore"):
                expected = exact_activation(g, threshold, activation).astype(g.dtype)
            np.testing.assert_array_equal(out.astype(np.float32), expected.astype(np.float32))
            assert not bits(out[~reference.active(g, threshold)]).any(), "an inactive output is not +0"
