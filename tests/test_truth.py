"""The measurements' float64 truth against the formulas as written. Every number of the benchmarks is held against it."""

from __future__ import annotations

import numpy as np
import pytest
from checks import DTYPES, exact_activation, exact_ffn_1, exact_ffn_4, exact_ffn_23, gate, norm_weight, token, weights

from prosparse_cupy import reference
from prosparse_cupy.testing import synthetic, truth


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["relu", "relu2", "drelu"])
def test_several_tokens_are_each_as_alone(dtype, activation):
    """NaN in a row that one token needs leaves another's zeros as they are."""
    rng, d_ff, d_model, threshold = np.random.default_rng(), 3000, 40, 0.25
    x, w = np.stack([token(d_model, dtype, rng) for _ in range(3)]), weights(d_ff, d_model, dtype).copy()
    g = np.stack([gate(d_ff, dtype, sparsity, rng, threshold) for sparsity in (0.5, 1.0, 0.9)])
    on = reference.active(g, threshold)
    w[~on[0]] = np.nan
    on[2] &= on[0]
    x1, norm = np.where(on, g, np.zeros_like(g)), norm_weight(d_ff, dtype, rng)
    for together, alone in [
        (truth.dot(w, x), [truth.dot(w, row) for row in x]),
        (truth.up(g, w, x, on, activation=activation), [truth.up(*each, activation=activation) for each in _with(w, g, x, on)]),
        (truth.half(g, activation, on), [truth.half(g[i], activation, on[i]) for i in range(3)]),
        (truth.down(x1, w), [truth.down(row, w) for row in x1]),
        (
            truth.down(x1, w, norm_weight=norm, norm_eps=1e-5),
            [truth.down(row, w, norm_weight=norm, norm_eps=1e-5) for row in x1],
        ),
    ]:
        np.testing.assert_array_equal(together, np.stack(alone))
    assert np.isfinite(truth.up(g, w, x, on, activation=activation)).all() and not truth.down(x1, w)[1].any()


def _with(w, g, x, on):
    return [(g[i], w, x[i], on[i]) for i in range(len(x))]


def test_the_error_of_several_tokens_is_the_largest():
    exact = np.array([[3.0, 4.0], [0.0, 0.0], [30.0, 40.0]])
    for row, wrong, error in [(0, 1.0, 0.2), (1, 0.5, 0.5), (2, 1.0, 0.02)]:
        out = exact.astype(np.float32)
        out[row, 0] += wrong
        assert truth.relative_error(out, exact) == pytest.approx(error)
        assert truth.relative_error(out[row], exact[row]) == pytest.approx(error)
    assert np.isnan(truth.relative_error(np.array([[3, 4], [0, np.nan], [30, 40]], np.float32), exact))


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_correlated_tokens_share_their_part(share):
    rng, d_ff, sparsity, tokens = np.random.default_rng(), 11008, 0.89, 8
    masks = synthetic.correlated_masks(d_ff, sparsity, tokens, rng, share)
    count = synthetic.active_count(d_ff, sparsity)
    assert masks.shape == (tokens, d_ff) and (masks.sum(axis=1) == count).all()
    core, common = round(share * count), masks.all(axis=0).sum()
    assert core <= common <= core + 3
    rest = 1 - (1 - (count - core) / (d_ff - core)) ** tokens  # of the others, active for some token
    assert masks.any(axis=0).sum() == pytest.approx(core + (d_ff - core) * rest, rel=0.03)


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_correlated_tokens_at_the_ends(sparsity):
    masks = synthetic.correlated_masks(101, sparsity, 3, np.random.default_rng())
    assert (masks == (sparsity == 0)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 8])
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_steered_weights_make_the_masks(dtype, tokens, share):
    """After rounding too, and weights move no further than they must."""
    rng, d_ff, d_model, threshold = np.random.default_rng(), 3000, 256, 0.25
    x, w = np.stack([token(d_model, dtype, rng) for _ in range(tokens)]), weights(d_ff, d_model, dtype).copy()
    masks = synthetic.correlated_masks(d_ff, 0.89, tokens, rng, share)
    synthetic.steer(w, x, synthetic.gate_of(masks, threshold, rng))
    np.testing.assert_array_equal(reference.active(truth.rounded(truth.dot(w, x), x), threshold), masks)
    moved = w.astype(np.float64) - weights(d_ff, d_model, dtype).astype(np.float64)
    assert np.abs(moved).max() < 0.5
    if tokens == 1:
        other = weights(d_ff, d_model, dtype).copy()
        synthetic.steer(other, x[0], synthetic.gate_of(masks[0], threshold, rng))
        np.testing.assert_array_equal(reference.active(reference.ffn_1(x[0], other), threshold), masks[0])


def test_tokens_that_cannot_have_their_gates_are_refused():
    """Equal ones with other gates, or more than they have elements; equal ones with equal gates can be had."""
    rng, w = np.random.default_rng(), weights(100, 8, "bfloat16").copy()
    x, gates = np.stack([token(8, "bfloat16", rng)] * 2), synthetic.gate_of(np.ones((2, 100), bool), 0.25, rng)
    gates[1] = gates[0]
    synthetic.steer(w, x, gates)
    np.testing.assert_allclose(truth.dot(w, x), gates, atol=0.1)
    gates[1, 3] = -gates[1, 3]
    with pytest.raises(ValueError, match=r"^steer: 2 tokens of 8 elements cannot have these gates: off by "):
        synthetic.steer(w, x, gates)
    x = np.stack([token(8, "bfloat16", rng) for _ in range(9)])
    with pytest.raises(ValueError, match=r"^steer: 9 tokens of 8 elements cannot"):
        synthetic.steer(w, x, synthetic.gate_of(rng.random((9, 100)) < 0.5, 0.25, rng))
