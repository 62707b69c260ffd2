"""ffn_4 on the GPU."""

from __future__ import annotations

import numpy as np
import pytest
from checks import (
    DTYPES,
    LARGE,
    SMALL,
    SPARSITIES,
    assert_no_worse_than_vendor,
    assert_rounded_sum,
    bits,
    exact_ffn_4,
    gate,
    norm_weight,
    poisoned,
    terms_of_ffn_4,
    token,
    weights,
)
from gpu_arrays import OnCupy, OnTorch, exact_mv, large_weights, vendor_mv

import prosparse_cupy as psc
from prosparse_cupy import reference
from prosparse_cupy.testing import synthetic

pytestmark = pytest.mark.gpu
on = OnCupy()


def _x1(d_ff: int, dtype: str, sparsity: float | str, rng: np.random.Generator) -> np.ndarray:
    """Signed, as the up-projection makes it."""
    return (reference.fatrelu(gate(d_ff, dtype, sparsity, rng)) * token(d_ff, dtype, rng)).astype(DTYPES[dtype])


@pytest.mark.parametrize("specialize", [True, False], ids=["specialised", "dynamic"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d_model", "d_ff"), SMALL)
def test_small_and_odd_shapes(d_model, d_ff, dtype, specialize):
    rng = np.random.default_rng()
    w = weights(d_ff, d_model, dtype)
    for sparsity in SPARSITIES:
        x1 = _x1(d_ff, dtype, sparsity, rng)
        out = on.put(poisoned(d_model, dtype))
        assert psc.ffn_4(on.put(x1), on.put(w), out=out, specialize=specialize) is out
        assert_rounded_sum(on.get(out), *exact_ffn_4(x1, w), d_ff)


@pytest.mark.parametrize("dtype", DTYPES)
def test_biases_and_norms(dtype):
    """NaN in the weights of inactive inputs, the norm's too, does no harm, and of nothing active the bias is left."""
    rng = np.random.default_rng()
    for d_model, d_ff in SMALL:
        for sparsity in SPARSITIES:
            x1, w = _x1(d_ff, dtype, sparsity, rng), weights(d_ff, d_model, dtype).copy()
            w[x1 == 0] = np.nan
            bias, norm = token(d_model, dtype, rng), norm_weight(d_ff, dtype, rng)
            norm[x1 == 0] = np.nan
            for b, n, eps, specialize in [(bias, None, 0.0, True), (None, norm, 0.0, False), (bias, norm, 1e-5, True)]:
                given = {"bias": None if b is None else on.put(b), "norm_weight": None if n is None else on.put(n)}
                out = on.put(poisoned(d_model, dtype))
                assert psc.ffn_4(on.put(x1), on.put(w), **given, norm_eps=eps, out=out, specialize=specialize) is out
                exact = exact_ffn_4(x1, w, b, n, eps)
                assert_rounded_sum(on.get(out), *exact, terms_of_ffn_4(d_ff, normed=n is not None))
                if not x1.astype(np.float32).any():
                    np.testing.assert_array_equal(on.get(out), np.zeros_like(bias) if b is None else b)


def test_dims_as_constants_do_not_change_the_bits_of_a_norm():
    """At BitNet's dims, and as often as it is run."""
    d_model, d_ff = 2560, 6912
    rng = np.random.default_rng()
    x1, w = on.put(_x1(d_ff, "bfloat16", 0.9, rng)), on.put(weights(d_ff, d_model, "bfloat16"))
    options = {"bias": on.put(token(d_model, "bfloat16", rng)), "norm_weight": on.put(norm_weight(d_ff, "bfloat16", rng))}
    first, *others = (on.get(psc.ffn_4(x1, w, **options, norm_eps=1e-5, specialize=s)) for s in (True, False, True))
    for other in others:
        np.testing.assert_array_equal(bits(other), bits(first))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_are_not_lost_in_a_norm(value):
    x1, w = np.ones(100, DTYPES["bfloat16"]), np.ones((100, 64), DTYPES["bfloat16"])
    x1[37] = value
    assert np.isnan(on.get(psc.ffn_4(on.put(x1), on.put(w), norm_weight=on.put(np.ones_like(x1)))).astype(np.float32)).all()


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d_model", "d_ff"), LARGE)
def test_no_worse_than_the_vendor(d_model, d_ff, dtype, sparsity, torch):
    to = OnTorch()
    x1, w = to.put(_x1(d_ff, dtype, sparsity, np.random.default_rng())), large_weights(d_ff, d_model, dtype)
    exact, magnitude = exact_mv(w.t(), x1)
    first = to.get(psc.ffn_4(x1, w, out=to.put(poisoned(d_model, dtype))))
    assert_rounded_sum(first, exact, magnitude, d_ff)
    assert_no_worse_than_vendor(first, to.get(vendor_mv(w.t().contiguous(), x1)), exact)
    np.testing.assert_array_equal(bits(first), bits(to.get(psc.ffn_4(x1, w))))


@pytest.mark.parametrize("mask", [synthetic.hot_mask, synthetic.uniform_mask, synthetic.contiguous_mask])
def test_masks(mask):
    rng = np.random.default_rng()
    d_ff, d_model = 11008, 4096
    neurons = mask(synthetic.popularity(d_ff, rng) if mask is synthetic.hot_mask else d_ff, 0.9, rng)
    x1 = np.where(neurons, token(d_ff, "float32", rng), 0).astype(DTYPES["bfloat16"])
    w = weights(d_ff, d_model, "bfloat16")
    assert_rounded_sum(on.get(psc.ffn_4(on.put(x1), on.put(w))), *exact_ffn_4(x1, w), d_ff)


def test_more_rows_than_are_listed_at_a_time():
    d_model = 16
    d_ff = 3 * 32 * 512 + 7
    x1, w = _x1(d_ff, "bfloat16", 0.3, np.random.default_rng()), weights(d_ff, d_model, "bfloat16")
    for specialize in (True, False):
        out = on.get(psc.ffn_4(on.put(x1), on.put(w), specialize=specialize))
        assert_rounded_sum(out, *exact_ffn_4(x1, w), d_ff)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_inactive_inputs_are_not_read_into_the_result(dtype):
    rng = np.random.default_rng()
    x1, w = _x1(1000, dtype, 0.8, rng), weights(1000, 512, dtype).copy()
    clean = on.get(psc.ffn_4(on.put(x1), on.put(w)))
    w[x1 == 0] = np.nan
    np.testing.assert_array_equal(bits(on.get(psc.ffn_4(on.put(x1), on.put(w)))), bits(clean))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_are_not_dropped(dtype):
    x1 = np.zeros(100, DTYPES[dtype])
    w = np.ones((100, 64), DTYPES[dtype])
    for value in (np.nan, np.inf, -np.inf):
        x1[37] = value
        np.testing.assert_array_equal(on.get(psc.ffn_4(on.put(x1), on.put(w))).astype(np.float32), np.full(64, value))


@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_match_to_the_bit(dtype):
    rng = np.random.default_rng()
    x1 = (rng.integers(-2, 3, 1500) * (rng.random(1500) < 0.3)).astype(DTYPES[dtype])
    w = rng.integers(-1, 2, (1500, 4096)).astype(DTYPES[dtype])
    out, expected = on.get(psc.ffn_4(on.put(x1), on.put(w))), psc.reference.ffn_4(x1, w)
    np.testing.assert_array_equal(out.astype(np.float32), expected.astype(np.float32))
