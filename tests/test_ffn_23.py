"""ffn_23 on the GPU."""

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
    exact_ffn_23,
    gate,
    poisoned,
    token,
    ulp,
    weights,
)
from gpu_arrays import OnCupy, OnTorch, exact_mv, large_weights, vendor_mv

import prosparse_cupy as psc
from prosparse_cupy import reference
from prosparse_cupy.testing import synthetic

pytestmark = pytest.mark.gpu
on = OnCupy()


def _assert_right(out: np.ndarray, g: np.ndarray, x: np.ndarray, w: np.ndarray, threshold: float) -> None:
    exact, magnitude = exact_ffn_23(g, x, w, threshold)
    assert_rounded_sum(out, exact, magnitude, len(x) + 1)
    assert not bits(out[~reference.active(g, threshold)]).any(), "an inactive output is not +0"


@pytest.mark.parametrize("specialize", [True, False], ids=["specialised", "dynamic"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d_model", "d_ff"), SMALL)
def test_small_and_odd_shapes(d_model, d_ff, dtype, specialize):
    rng = np.random.default_rng()
    w = weights(d_ff, d_model, dtype)
    for threshold in (0.0, 0.25):
        for sparsity in SPARSITIES:
            g, x = gate(d_ff, dtype, sparsity, rng, threshold), token(d_model, dtype, rng)
            out = on.put(poisoned(d_ff, dtype))
            assert psc.ffn_23(on.put(g), on.put(x), on.put(w), threshold, out=out, specialize=specialize) is out
            _assert_right(on.get(out), g, x, w, threshold)


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_and_biases(dtype):
    """NaN in a row or a bias of an inactive neuron does no harm."""
    rng, threshold = np.random.default_rng(), 0.25
    for d_model, d_ff in SMALL:
        for activation, biased in [("relu", True), ("relu2", False), ("relu2", True), ("drelu", False), ("drelu", True)]:
            for sparsity, specialize in ((0.0, False), (0.5, True), (0.9, False), ("one", True)):
                g, x, w = (
                    gate(d_ff, dtype, sparsity, rng, threshold),
                    token(d_model, dtype, rng),
                    weights(d_ff, d_model, dtype).copy(),
                )
                bias, off = token(d_ff, dtype, rng) if biased else None, ~reference.active(g, threshold)
                w[off] = np.nan
                if biased:
                    bias[off] = np.nan
                out, given = on.put(poisoned(d_ff, dtype)), None if bias is None else on.put(bias)
                options = {"activation": activation, "bias": given, "specialize": specialize}
                assert psc.ffn_23(on.put(g), on.put(x), on.put(w), threshold, out=out, **options) is out
                found = on.get(out)
                assert_rounded_sum(found, *exact_ffn_23(g, x, w, threshold, activation, bias), d_model + 2)
                assert not bits(found[off]).any(), "an inactive output is not +0"
                if activation == "drelu":
                    assert not np.signbit(found.astype(np.float32)).any(), "a rectified output is +0"


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d_model", "d_ff"), LARGE)
def test_no_worse_than_the_vendor(d_model, d_ff, dtype, sparsity, torch):
    rng, threshold, to = np.random.default_rng(), 0.25, OnTorch()
    g = gate(d_ff, dtype, sparsity, rng, threshold)
    arrays = to.put(g), to.put(token(d_model, dtype, rng)), large_weights(d_ff, d_model, dtype)
    first = to.get(psc.ffn_23(*arrays, threshold, out=to.put(poisoned(d_ff, dtype))))
    s = reference.fatrelu(g, threshold)
    up, magnitude = exact_mv(arrays[2], arrays[1])
    exact = s.astype(np.float64) * up
    assert_rounded_sum(first, exact, np.abs(s.astype(np.float64)) * magnitude, d_model + 1)
    assert not bits(first[s == 0]).any(), "an inactive output is not +0"
    np.testing.assert_array_equal(bits(first), bits(to.get(psc.ffn_23(*arrays, threshold))))
    if np.count_nonzero(s) > 30:  # fewer give no estimate of the vendor's error
        dense = to.put(s) * vendor_mv(arrays[2], arrays[1])
        assert_no_worse_than_vendor(first, to.get(dense), exact)


@pytest.mark.parametrize(("d_model", "d_ff"), LARGE)
@pytest.mark.parametrize("mask", [synthetic.hot_mask, synthetic.uniform_mask, synthetic.contiguous_mask])
def test_masks(mask, d_model, d_ff):
    rng = np.random.default_rng()
    neurons = mask(synthetic.popularity(d_ff, rng) if mask is synthetic.hot_mask else d_ff, 0.9, rng)
    g = synthetic.gate_of(neurons, 0.01, rng).astype(DTYPES["bfloat16"])
    np.testing.assert_array_equal(reference.active(g, 0.01), neurons)
    x, w = token(d_model, "bfloat16", rng), weights(d_ff, d_model, "bfloat16")
    _assert_right(on.get(psc.ffn_23(on.put(g), on.put(x), on.put(w), 0.01)), g, x, w, 0.01)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_inactive_neurons_are_not_read_into_the_result(dtype):
    rng = np.random.default_rng()
    g, x, w = gate(1000, dtype, 0.8, rng, 0.25), token(512, dtype, rng), weights(1000, 512, dtype).copy()
    clean = on.get(psc.ffn_23(on.put(g), on.put(x), on.put(w), 0.25))
    w[~reference.active(g, 0.25)] = np.nan
    np.testing.assert_array_equal(bits(on.get(psc.ffn_23(on.put(g), on.put(x), on.put(w), 0.25))), bits(clean))


@pytest.mark.parametrize("specialize", [True, False], ids=["specialised", "dynamic"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d_model", "d_ff"), [(4096, 1007), (5120, 1007), (1536, 1007)])
def test_the_bits_of_a_row_do_not_depend_on_which_others_are_active(d_model, d_ff, dtype, specialize):
    rng = np.random.default_rng()
    g, x, w = np.abs(token(d_ff, dtype, rng)) + DTYPES[dtype].type(1), token(d_model, dtype, rng), weights(d_ff, d_model, dtype)
    x, w = on.put(x), on.put(w)
    every = on.get(psc.ffn_23(on.put(g), x, w, specialize=specialize))
    for sparsity in (0.5, 0.7, 0.9, 0.99):
        active = rng.random(d_ff) >= sparsity
        some = np.where(active, g, np.zeros_like(g))
        out = on.get(psc.ffn_23(on.put(some), x, w, out=on.put(poisoned(d_ff, dtype)), specialize=specialize))
        np.testing.assert_array_equal(bits(out), bits(np.where(active, every, np.zeros_like(every))))


@pytest.mark.parametrize("specialize", [True, False], ids=["a row a warp", "warps share rows"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_boundaries_and_special_values(dtype, specialize):
    """A gate at the threshold is kept, NaN is active, -0 is not; subnormals may be flushed by at most themselves."""
    t = np.array(0.3).astype(DTYPES[dtype])
    neighbours = (t.view(f"i{t.itemsize}") + np.arange(-2, 3)).astype(f"i{t.itemsize}").view(DTYPES[dtype])
    smallest = np.array([1], f"i{t.itemsize}").view(DTYPES[dtype])
    special = np.array([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0], np.float32).astype(DTYPES[dtype])
    g = np.concatenate([neighbours, smallest, -smallest, special])
    x, w = np.ones(8, DTYPES[dtype]), np.ones((len(g), 8), DTYPES[dtype])
    for threshold in (0.0, float(t)):
        out = on.get(psc.ffn_23(on.put(g), on.put(x), on.put(w), threshold, specialize=specialize))
        expected = reference.ffn_23(g, x, w, threshold)
        off = ~reference.active(g, threshold)
        assert not bits(out[off]).any()
        flushed = np.abs(expected.astype(np.float32)) < float(np.finfo(np.float32).smallest_normal)
        np.testing.assert_array_equal(out[~flushed].astype(np.float32), expected[~flushed].astype(np.float32))
        tiny = float(np.finfo(np.float32).smallest_normal)
        assert np.all(np.abs(out[flushed].astype(np.float64)) <= tiny + ulp(expected[flushed], out.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_of_other_activations(dtype):
    """Every special gate with every special up-projection, in kernels that give a warp a row and that share rows."""
    values = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 0.25, 0.2490234375, -0.25, 1.5, -2.0, 300.0]).astype(DTYPES[dtype])
    g, ups = (a.ravel() for a in np.meshgrid(values, values))
    x, w = np.eye(8, dtype=DTYPES[dtype])[0], np.zeros((len(g), 8), DTYPES[dtype])
    w[:, 0] = ups
    for activation in ("relu2", "drelu"):
        for threshold, specialize in ((0.0, True), (0.25, True), (0.0, False), (0.25, False)):
            options = {"activation": activation, "specialize": specialize}
            out = on.get(psc.ffn_23(on.put(g), on.put(x), on.put(w), threshold, **options))
            with np.errstate(all="ignore"):
                expected = reference.ffn_23(g, x, w, threshold, activation=activation)
            np.testing.assert_array_equal(out.astype(np.float32), expected.astype(np.float32))
            off = ~reference.active(g, threshold) | ((activation == "drelu") & (ups.astype(np.float32) <= 0))
            assert not bits(out[off]).any(), "an inactive output is not +0"


@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_match_to_the_bit(dtype):
    rng = np.random.default_rng()
    g = rng.integers(-2, 3, 777).astype(DTYPES[dtype])
    x = rng.integers(-2, 3, 4096).astype(DTYPES[dtype])
    w = rng.integers(-1, 2, (777, 4096)).astype(DTYPES[dtype])
    out = on.get(psc.ffn_23(on.put(g), on.put(x), on.put(w)))
    expected = psc.reference.ffn_23(g, x, w)
    np.testing.assert_array_equal(out.astype(np.float32), expected.astype(np.float32))


def test_a_new_threshold_does_not_compile():
    from prosparse_cupy.compiler import load

    rng = np.random.default_rng()
    g, x, w = (on.put(a) for a in (gate(64, "bfloat16", 0.5, rng), token(32, "bfloat16", rng), weights(64, 32, "bfloat16")))
    psc.ffn_23(g, x, w)
    before = load.cache_info().currsize
    for threshold in (0.1, 0.2, 0.3):
        psc.ffn_23(g, x, w, threshold)
    assert load.cache_info().currsize == before
