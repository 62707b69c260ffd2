"""pack_down on the GPU: a transpose to the bit."""

from __future__ import annotations

import numpy as np
import pytest
from checks import DTYPES, bits, poisoned, weights
from gpu_arrays import OnCupy, OnTorch

import prosparse_cupy as psc

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("specialize", [True, False], ids=["specialised", "dynamic"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d_model", "d_ff"), [(4096, 11008), (4104, 1007), (8, 1), (16, 33), (264, 101)])
def test_transposes(d_model, d_ff, dtype, specialize):
    on = OnCupy()
    w = weights(d_model, d_ff, dtype)
    out = on.put(poisoned((d_ff, d_model), dtype))
    assert psc.pack_down(on.put(w), out=out, specialize=specialize) is out
    np.testing.assert_array_equal(bits(on.get(out)), bits(w.T))


def test_torch(torch):
    on = OnTorch()
    w = weights(64, 100, "bfloat16")
    packed = psc.pack_down(on.put(w))
    assert isinstance(packed, torch.Tensor) and packed.is_contiguous() and packed.shape == (100, 64)
    np.testing.assert_array_equal(bits(on.get(packed)), bits(w.T))
