"""sparse_ffn and SparseFFN: the whole FFN, on the GPU and through the reference."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from checks import DTYPES, assert_no_worse_than_vendor, bits, poisoned, token
from gpu_arrays import OnCupy, OnTorch, large_weights, vendor_mv

import prosparse_cupy as psc
from prosparse_cupy import reference
from prosparse_cupy.testing import synthetic

on = OnCupy()
SHAPES = [(4096, 11008), (5120, 13824), (1536, 3840), (4104, 1007), (264, 101)]
T = 0.01


def _layer(d_model: int, d_ff: int, dtype: str, sparsity: float, seed: int | None = None):
    return synthetic.layer(d_model, d_ff, DTYPES[dtype], sparsity, T, np.random.default_rng(seed))


def _on_gpu(layer: synthetic.Layer):
    return [on.put(a) for a in (layer.x, layer.w_gate, layer.w_up, layer.w_down.T.copy())]


def _random_ffn(d_model: int, d_ff: int, dtype: str, sparsity: float):
    """x, w_gate, w_up and w_down_t as tensors, with a hot-neuron mask of this sparsity."""
    rng, to = np.random.default_rng(), OnTorch()
    x = to.put(token(d_model, dtype, rng))
    w_gate, w_up, w_down_t = (large_weights(d_ff, d_model, dtype, seed) for seed in range(3))
    mask = synthetic.hot_mask(synthetic.popularity(d_ff, rng), sparsity, rng)
    target = to.put(synthetic.gate_of(mask, T, rng))
    along = x.float() / x.float().square().sum()
    w_gate = (w_gate.float() + (target - w_gate.float() @ x.float()).outer(along)).to(w_gate.dtype)
    return x, w_gate, w_up, w_down_t, mask


def _dense_ffn(x, w_gate, w_up, w_down_t):
    """The dense path, in the dtype of x."""
    gate = vendor_mv(w_gate, x)
    s = gate.where(gate >= T, gate.new_zeros(()))
    return vendor_mv(w_down_t.t().contiguous(), s * vendor_mv(w_up, x))


def _exact_ffn(x, w_gate, w_up, w_down_t, mask) -> np.ndarray:
    """Float64, rounded only where the operators round: after formulas 1 and 3."""
    gate = (w_gate.double() @ x.double()).to(x.dtype)
    np.testing.assert_array_equal((gate >= T).cpu().numpy(), mask)
    s = gate.double() * (gate >= T)
    x1 = (s * (w_up.double() @ x.double())).to(x.dtype)
    return (x1.double() @ w_down_t.double()).cpu().numpy()


@pytest.mark.gpu
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d_model", "d_ff"), SHAPES)
def test_no_worse_than_the_vendor(d_model, d_ff, dtype, sparsity, torch):
    to = OnTorch()
    *arrays, mask = _random_ffn(d_model, d_ff, dtype, sparsity)
    exact, dense = _exact_ffn(*arrays, mask), _dense_ffn(*arrays)
    for specialize in (True, False):
        out = to.put(poisoned(d_model, dtype))
        assert psc.sparse_ffn(*arrays, T, out=out, specialize=specialize) is out
        first = to.get(out)
        assert_no_worse_than_vendor(first, to.get(dense), exact)
        ffn = psc.SparseFFN(*arrays[1:], T, specialize=specialize)
        for again in (ffn(arrays[0]), ffn(arrays[0][None])[0], psc.sparse_ffn(*arrays, T, specialize=specialize)):
            np.testing.assert_array_equal(bits(to.get(again)), bits(first))


@pytest.mark.gpu
def test_a_second_shape_after_the_first():
    """Arrays of another shape specialise by themselves, and a smaller FFN's scratch does not serve a larger one."""
    import cupy

    from prosparse_cupy.compiler import load

    shapes = [(256, 1000), (512, 11008), (640, 13824), (512, 11008), (256, 1000), (256, 60000)]
    layers = {shape: _layer(*shape, "bfloat16", 0.9, seed=shape[1]) for shape in set(shapes)}
    arrays = {shape: _on_gpu(layer) for shape, layer in layers.items()}
    alone = {}
    for shape, layer in layers.items():
        alone[shape] = on.get(psc.sparse_ffn(*arrays[shape], layer.threshold))
        assert_near_float64(alone[shape], layer)
    before = load.cache_info()
    outs = [(shape, psc.sparse_ffn(*arrays[shape], layers[shape].threshold)) for _ in range(20) for shape in shapes]
    cupy.cuda.Device().synchronize()
    for shape, out in outs:
        np.testing.assert_array_equal(bits(on.get(out)), bits(alone[shape]))
    assert load.cache_info().misses == before.misses


def assert_near_float64(out: np.ndarray, layer: synthetic.Layer) -> None:
    """Within bfloat16's reach of the reference: another shape's numbers are not."""
    exact = reference.sparse_ffn(layer.x, layer.w_gate, layer.w_up, layer.w_down.T, layer.threshold).astype(np.float64)
    assert np.linalg.norm(out.astype(np.float64) - exact) <= 0.02 * np.linalg.norm(exact)


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
    """Each stream has numbers of its own, so that another's x1 in its scratch shows."""
    import cupy

    layers = [_layer(1024, 11008, "bfloat16", 0.9, seed) for seed in range(4)]
    arrays = [_on_gpu(layer) for layer in layers]
    expected = [on.get(psc.sparse_ffn(*a, T)) for a in arrays]
    assert len({e.tobytes() for e in expected}) == 4
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in layers]
    cupy.cuda.Device().synchronize()
    outs = [[] for _ in layers]
    for _ in range(20):
        for stream, mine, own in zip(streams, outs, arrays, strict=True):
            with stream:
                mine.append(psc.sparse_ffn(*own, T))
    cupy.cuda.Device().synchronize()
    for mine, right in zip(outs, expected, strict=True):
        for out in mine:
            np.testing.assert_array_equal(bits(on.get(out)), bits(right))


@pytest.mark.gpu
@pytest.mark.parametrize("change", ["float", "larger"])
def test_weights_that_change_under_a_sparse_ffn_are_refused(change, torch):
    """It used to write beyond its scratch."""
    to = OnTorch()
    x, *ws = (to.put(on.get(a)) for a in _on_gpu(_layer(256, 1000, "bfloat16", 0.5)))
    ws = [torch.nn.Parameter(w, requires_grad=False) for w in ws]
    ffn = psc.SparseFFN(*ws, T)
    before = ffn(x)
    for w in ws:
        w.data = w.data.clone()
    assert torch.equal(ffn(x), before), "elsewhere in memory, they are the same weights"
    for w in ws:
        w.data = w.data.float() if change == "float" else torch.cat([w.data] * 4)
    out = torch.full_like(x, float("nan"), dtype=ws[0].dtype)
    with pytest.raises(ValueError, match=r"SparseFFN: its weights have changed since it was built: .* make a new SparseFFN"):
        ffn(x.to(ws[0].dtype), out=out)
    assert bool(out.isnan().all())


@pytest.mark.parametrize("how", ["copy", "pickle"])
def test_a_sparse_ffn_can_be_copied(how):
    layer = _layer(64, 101, "bfloat16", 0.5)
    ffn = psc.SparseFFN(layer.w_gate, layer.w_up, psc.pack_down(layer.w_down), T)
    again = copy.deepcopy(ffn) if how == "copy" else pickle.loads(pickle.dumps(ffn))
    np.testing.assert_array_equal(bits(again(layer.x)), bits(ffn(layer.x)))


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
