"""sparse_ffn and SparseFFN: the whole FFN, on the GPU and through the reference."""

from __future__ import annotations

import numpy as np
import pytest
from checks import DTYPES, assert_no_worse_than_vendor, bits, poisoned, ulp
from gpu_arrays import OnCupy, OnTorch

import prosparse_cupy as psc
from prosparse_cupy import reference, synthetic

on = OnCupy()
LARGE = [(4096, 11008), (5120, 13824), (1536, 3840)]
SMALL = [(4104, 1007), (8, 1), (16, 3), (264, 101)]


def _layer(d_model: int, d_ff: int, dtype: str, sparsity: float, threshold: float = 0.01, seed: int | None = None):
    return synthetic.layer(d_model, d_ff, DTYPES[dtype], sparsity, threshold, np.random.default_rng(seed))


def _exact(layer: synthetic.Layer) -> np.ndarray:
    """Float64, rounded where the dense path rounds: after formulas 1 and 3."""
    gate = reference.ffn_1(layer.x, layer.w_gate)
    np.testing.assert_array_equal(reference.active(gate, layer.threshold), layer.mask)
    x1 = reference.ffn_23(gate, layer.x, layer.w_up, layer.threshold)
    return x1.astype(np.float64) @ layer.w_down.astype(np.float64).T


def _on_gpu(layer: synthetic.Layer, library=on):
    return [library.put(a) for a in (layer.x, layer.w_gate, layer.w_up, layer.w_down.T.copy())]


def _vendor(layer: synthetic.Layer) -> np.ndarray:
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    to = OnTorch()
    x, w_gate, w_up, w_down = (to.put(a) for a in (layer.x, layer.w_gate, layer.w_up, layer.w_down))
    gate = torch.mv(w_gate, x)
    s = torch.where(gate >= layer.threshold, gate, torch.zeros_like(gate))
    return to.get(torch.mv(w_down, s * torch.mv(w_up, x)))


@pytest.mark.gpu
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d_model", "d_ff"), LARGE)
def test_no_worse_than_the_vendor(d_model, d_ff, dtype, sparsity, torch):
    layer = _layer(d_model, d_ff, dtype, sparsity)
    x, *weights = _on_gpu(layer)
    first = on.get(psc.sparse_ffn(x, *weights, layer.threshold, out=on.put(poisoned(d_model, dtype))))
    assert_no_worse_than_vendor(first, _vendor(layer), _exact(layer))
    ffn = psc.SparseFFN(*weights, layer.threshold)
    out = on.put(poisoned(d_model, dtype))
    assert ffn(x, out=out) is out
    for again in (out, ffn(x), psc.sparse_ffn(x, *weights, layer.threshold)):
        np.testing.assert_array_equal(bits(on.get(again)), bits(first))


@pytest.mark.gpu
@pytest.mark.parametrize("specialize", [True, False], ids=["specialised", "dynamic"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d_model", "d_ff"), SMALL)
def test_small_and_odd_shapes(d_model, d_ff, dtype, specialize):
    layer = _layer(d_model, d_ff, dtype, 0.5)
    x, *weights = _on_gpu(layer)
    exact = _exact(layer)
    # The operators' own roundings of gate and x1 may differ from the reference's by an ulp each.
    slack = 4 * float(np.max(ulp(np.abs(exact).max(keepdims=True), DTYPES[dtype])))
    for out in (
        psc.sparse_ffn(x, *weights, layer.threshold, specialize=specialize),
        psc.SparseFFN(*weights, layer.threshold, specialize=specialize)(x),
        psc.sparse_ffn(x[None], *weights, layer.threshold, specialize=specialize)[0],
    ):
        assert np.abs(on.get(out).astype(np.float64) - exact).max() <= slack


@pytest.mark.gpu
def test_a_second_shape_after_the_first():
    """13B arrays after 7B arrays specialise by themselves; both stay compiled."""
    from prosparse_cupy._compile import load

    results = {}
    for d_model, d_ff in [(4096, 11008), (5120, 13824), (4096, 11008)]:
        layer = _layer(d_model, d_ff, "bfloat16", 0.9, seed=d_ff)
        out = on.get(psc.sparse_ffn(*_on_gpu(layer), layer.threshold))
        results.setdefault(d_ff, out)
        np.testing.assert_array_equal(bits(out), bits(results[d_ff]))
    before = load.cache_info()
    psc.sparse_ffn(*_on_gpu(layer), layer.threshold)
    assert load.cache_info().misses == before.misses


@pytest.mark.gpu
def test_nothing_is_allocated_with_out():
    import cupy

    layer = _layer(512, 1000, "bfloat16", 0.9)
    x, *weights = _on_gpu(layer)
    ffn, y = psc.SparseFFN(*weights, layer.threshold), on.put(poisoned(512, "bfloat16"))
    gate, x1 = (on.put(poisoned(1000, "bfloat16")) for _ in range(2))

    def everything():
        psc.ffn_1(x, weights[0], out=gate)
        psc.ffn_23(gate, x, weights[1], layer.threshold, out=x1)
        psc.ffn_4(x1, weights[2], out=y)
        psc.sparse_ffn(x, *weights, layer.threshold, out=y)
        ffn(x, out=y)

    everything()

    class Allocations(cupy.cuda.MemoryHook):
        name = "Allocations"
        count = 0

        def malloc_preprocess(self, **_):
            self.count += 1

    with Allocations() as hook:
        everything()
    assert hook.count == 0
    with Allocations() as hook:
        psc.ffn_1(x, weights[0])
    assert hook.count == 1


@pytest.mark.gpu
def test_streams_do_not_share_scratch():
    import cupy

    layer = _layer(4096, 11008, "bfloat16", 0.9)
    x, *weights = _on_gpu(layer)
    expected = on.get(psc.sparse_ffn(x, *weights, layer.threshold))
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(4)]
    cupy.cuda.Device().synchronize()
    outs = []
    for _ in range(20):
        for stream in streams:
            with stream:
                outs.append(psc.sparse_ffn(x, *weights, layer.threshold))
    cupy.cuda.Device().synchronize()
    for out in outs:
        np.testing.assert_array_equal(bits(on.get(out)), bits(expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_arrays_run_the_reference(dtype):
    layer = _layer(64, 101, dtype, 0.5)
    w_down_t = psc.pack_down(layer.w_down)
    np.testing.assert_array_equal(bits(w_down_t), bits(np.ascontiguousarray(layer.w_down.T)))
    expected = reference.sparse_ffn(layer.x, layer.w_gate, layer.w_up, w_down_t, layer.threshold)
    np.testing.assert_array_equal(reference.active(psc.ffn_1(layer.x, layer.w_gate), layer.threshold), layer.mask)
    out = poisoned(64, dtype)
    ffn = psc.SparseFFN(layer.w_gate, layer.w_up, w_down_t, layer.threshold)
    assert ffn(layer.x, out=out) is out
    for result in (out, ffn(layer.x), psc.sparse_ffn(layer.x, layer.w_gate, layer.w_up, w_down_t, layer.threshold)):
        np.testing.assert_array_equal(bits(result), bits(expected))
