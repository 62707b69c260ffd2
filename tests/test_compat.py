"""The first release's call signatures."""

from __future__ import annotations

import numpy as np
import pytest
from checks import bits, gate, poisoned, token, weights
from gpu_arrays import OnTorch

from prosparse_cupy import reference
from prosparse_cupy.compat import ffn_4, ffn_23

D_MODEL, D_FF = 64, 104


def _numbers():
    rng = np.random.default_rng(0)
    return gate(D_FF, "bfloat16", 0.5, rng, 0.25), token(D_MODEL, "bfloat16", rng), weights(D_FF, D_MODEL, "bfloat16")


def _put(array):
    return array


def _both(put, get):
    g, x, w = _numbers()
    x1, y = put(poisoned(D_FF, "bfloat16")), put(poisoned(D_MODEL, "bfloat16"))
    assert ffn_23.torch_launch_ffn_fuse_23(put(g), put(x), put(w), x1, D_MODEL, D_FF, 0.25) is None
    assert ffn_4.torch_launch_ffn_4(put(w), x1, y, D_FF, D_MODEL) is None
    expected = reference.ffn_23(g, x, w, 0.25)
    return get(x1), expected, get(y), reference.ffn_4(get(x1), w)


def test_on_numpy():
    x1, expected_x1, y, expected_y = _both(_put, _put)
    np.testing.assert_array_equal(bits(x1), bits(expected_x1))
    np.testing.assert_array_equal(bits(y), bits(expected_y))


@pytest.mark.gpu
def test_on_torch(torch):
    to = OnTorch()
    x1, expected_x1, y, expected_y = _both(to.put, to.get)
    np.testing.assert_allclose(x1.astype(np.float32), expected_x1.astype(np.float32), rtol=2**-7)
    np.testing.assert_allclose(y.astype(np.float32), expected_y.astype(np.float32), rtol=2**-6, atol=2**-8)


def test_the_threshold_is_zero_by_default():
    g, x, w = _numbers()
    x1 = poisoned(D_FF, "bfloat16")
    ffn_23.torch_launch_ffn_fuse_23(g, x, w, x1, D_MODEL, D_FF)
    np.testing.assert_array_equal(bits(x1), bits(reference.ffn_23(g, x, w)))


def test_dims_are_checked_against_the_arrays():
    g, x, w = _numbers()
    x1, y = poisoned(D_FF, "bfloat16"), poisoned(D_MODEL, "bfloat16")
    with pytest.raises(ValueError, match=r"mat_up must have shape \(mat_col, mat_row\) = \(64, 104\).*got \(104, 64\)"):
        ffn_23.torch_launch_ffn_fuse_23(g, x, w, x1, D_FF, D_MODEL)
    with pytest.raises(ValueError, match=r"mat must have shape \(mat_row, mat_col\) = \(64, 104\).*got \(104, 64\)"):
        ffn_4.torch_launch_ffn_4(w, g, y, D_MODEL, D_FF)
    assert np.isnan(x1.astype(np.float32)).all() and np.isnan(y.astype(np.float32)).all()


def test_several_tokens_are_for_the_new_names():
    g, x, w = _numbers()
    x1, y = poisoned((2, D_FF), "bfloat16"), poisoned((2, D_MODEL), "bfloat16")
    advice = r"must hold one token, as in the first release, got shape \(2, \d+\): call prosparse_cupy.{}, which takes up to 8"
    with pytest.raises(ValueError, match=r"^torch_launch_ffn_fuse_23: vec_input " + advice.format("ffn_23")):
        ffn_23.torch_launch_ffn_fuse_23(np.stack([g] * 2), np.stack([x] * 2), w, x1, D_MODEL, D_FF)
    with pytest.raises(ValueError, match=r"^torch_launch_ffn_4: vec " + advice.format("ffn_4")):
        ffn_4.torch_launch_ffn_4(w, np.stack([g] * 2), y, D_FF, D_MODEL)
    assert np.isnan(x1.astype(np.float32)).all() and np.isnan(y.astype(np.float32)).all()
    ffn_4.torch_launch_ffn_4(w, g[None], y[:1], D_FF, D_MODEL)
    np.testing.assert_array_equal(bits(y[0]), bits(reference.ffn_4(g, w)))
