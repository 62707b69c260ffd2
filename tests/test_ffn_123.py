"""ffn_123 on the GPU: ffn_1 and ffn_23 in one launch."""

from __future__ import annotations

import numpy as np
import pytest
from checks import DTYPES, SMALL, assert_rounded_sum, bits, exact_ffn_23, gate, poisoned, token, weights
from gpu_arrays import OnCupy

import prosparse_cupy as psc
from prosparse_cupy import reference
from prosparse_cupy.testing import synthetic

pytestmark = pytest.mark.gpu
on = OnCupy()


@pytest.mark.parametrize("specialize", [True, False], ids=["specialised", "dynamic"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d_model", "d_ff"), [*SMALL, (4096, 11008), (5120, 13824), (1536, 3840)])
def test_ffn_1_and_ffn_23_to_the_bit(d_model, d_ff, dtype, specialize):
    rng, threshold = np.random.default_rng(), 0.25
    x = token(d_model, dtype, rng)
    for sparsity in (0.0, 0.5, 0.9, "one"):
        w_gate = weights(d_ff, d_model, dtype).copy()
        synthetic.steer(w_gate, x, gate(d_ff, "float32", sparsity, rng, threshold))
        arrays = on.put(x), on.put(w_gate), on.put(weights(d_ff, d_model, dtype, seed=1))
        out = on.put(poisoned(d_ff, dtype))
        assert psc.ffn_123(*arrays, threshold, out=out, specialize=specialize) is out
        g = psc.ffn_1(*arrays[:2])
        two = psc.ffn_23(g, arrays[0], arrays[2], threshold)
        np.testing.assert_array_equal(bits(on.get(out)), bits(on.get(two)))
    assert_rounded_sum(on.get(out), *exact_ffn_23(on.get(g), x, weights(d_ff, d_model, dtype, seed=1), threshold), d_model + 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_and_biases_are_those_of_ffn_1_and_ffn_23_to_the_bit(dtype):
    rng = np.random.default_rng()
    for d_model, d_ff in [(264, 101), (4104, 1007), (2560, 6912)]:
        x, w_gate, w_up = token(d_model, dtype, rng), weights(d_ff, d_model, dtype), weights(d_ff, d_model, dtype, seed=1)
        gate_bias, up_bias = token(d_ff, dtype, rng), token(d_ff, dtype, rng)
        arrays = on.put(x), on.put(w_gate), on.put(w_up)
        for activation, biased in [("relu", True), ("relu2", False), ("relu2", True), ("drelu", False), ("drelu", True)]:
            b = [on.put(a) if biased else None for a in (gate_bias, up_bias)]
            g = psc.ffn_1(*arrays[:2], bias=b[0])
            for specialize, threshold in ((True, 0.25), (False, 0.0)):
                options = {"activation": activation, "specialize": specialize}
                out = on.put(poisoned(d_ff, dtype))
                assert psc.ffn_123(*arrays, threshold, gate_bias=b[0], up_bias=b[1], out=out, **options) is out
                two = psc.ffn_23(g, arrays[0], arrays[2], threshold, bias=b[1], **options)
                np.testing.assert_array_equal(bits(on.get(out)), bits(on.get(two)))
                exact = exact_ffn_23(on.get(g), x, w_up, threshold, activation, up_bias if biased else None)
                assert_rounded_sum(on.get(out), *exact, d_model + 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_inactive_neurons_are_not_read_into_the_result(dtype):
    rng, threshold = np.random.default_rng(), 0.25
    x, w_up = token(512, dtype, rng), weights(1000, 512, dtype).copy()
    w_gate = weights(1000, 512, dtype, seed=1).copy()
    synthetic.steer(w_gate, x, gate(1000, "float32", 0.8, rng, threshold))
    clean = on.get(psc.ffn_123(on.put(x), on.put(w_gate), on.put(w_up), threshold))
    active = reference.active(on.get(psc.ffn_1(on.put(x), on.put(w_gate))), threshold)
    assert 100 < np.count_nonzero(active) < 300
    w_up[~active] = np.nan
    again = on.get(psc.ffn_123(on.put(x), on.put(w_gate), on.put(w_up), threshold))
    np.testing.assert_array_equal(bits(again), bits(clean))
    assert not bits(again[~active]).any(), "an inactive output is not +0"
