"""ffn_1 on the GPU."""

from __future__ import annotations

import numpy as np
import pytest
from checks import (
    DTYPES,
    LARGE,
    SMALL,
    assert_no_worse_than_vendor,
    assert_rounded_sum,
    bits,
    exact_ffn_1,
    poisoned,
    token,
    weights,
)
from gpu_arrays import OnCupy, OnTorch, exact_mv, large_weights, vendor_mv

import prosparse_cupy as psc

pytestmark = pytest.mark.gpu
on = OnCupy()


@pytest.mark.parametrize("specialize", [True, False], ids=["specialised", "dynamic"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d_model", "d_ff"), SMALL)
def test_small_and_odd_shapes(d_model, d_ff, dtype, specialize):
    x, w = token(d_model, dtype, np.random.default_rng()), weights(d_ff, d_model, dtype)
    out = on.put(poisoned(d_ff, dtype))
    assert psc.ffn_1(on.put(x), on.put(w), out=out, specialize=specialize) is out
    assert_rounded_sum(on.get(out), *exact_ffn_1(x, w), d_model)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d_model", "d_ff"), LARGE)
def test_no_worse_than_the_vendor(d_model, d_ff, dtype, torch):
    to = OnTorch()
    x, w = to.put(token(d_model, dtype, np.random.default_rng())), large_weights(d_ff, d_model, dtype)
    exact, magnitude = exact_mv(w, x)
    first = to.get(psc.ffn_1(x, w, out=to.put(poisoned(d_ff, dtype))))
    assert_rounded_sum(first, exact, magnitude, d_model)
    assert_no_worse_than_vendor(first, to.get(vendor_mv(w, x)), exact)
    assert_rounded_sum(to.get(psc.ffn_1(x, w, specialize=False)), exact, magnitude, d_model)
    np.testing.assert_array_equal(bits(first), bits(to.get(psc.ffn_1(x, w))))


@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_match_to_the_bit(dtype):
    rng = np.random.default_rng()
    x = rng.integers(-3, 4, 4096).astype(DTYPES[dtype])
    w = rng.integers(-1, 2, (777, 4096)).astype(DTYPES[dtype])
    out = on.get(psc.ffn_1(on.put(x), on.put(w)))
    np.testing.assert_array_equal(bits(out), bits(psc.reference.ffn_1(x, w)))
