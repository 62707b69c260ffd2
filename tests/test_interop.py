"""Array libraries, streams and CUDA graphs."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from checks import DTYPES, bits, gate, poisoned, token, weights
from gpu_arrays import Exporter, OnCupy, OnTorch
from plans import Shape, plan_of

import prosparse_cupy as psc
from prosparse_cupy import reference
from prosparse_cupy.testing import synthetic

pytestmark = pytest.mark.gpu
D_MODEL, D_FF, T = 512, 1000, 0.25


def _numbers(dtype: str = "bfloat16", seed: int = 0):
    """gate, x, x1 and one weight matrix, as NumPy arrays."""
    rng = np.random.default_rng(seed)
    g, x, w = gate(D_FF, dtype, 0.8, rng, T), token(D_MODEL, dtype, rng), weights(D_FF, D_MODEL, dtype)
    return g, x, reference.ffn_23(g, x, w, T), w


def _through(library, dtype: str = "bfloat16"):
    """Every operator's result in one library."""
    g, x, x1, w = (library.put(a) for a in _numbers(dtype))
    results = [psc.ffn_1(x, w), psc.ffn_23(g, x, w, T), psc.ffn_4(x1, w), psc.sparse_ffn(x, w, w, w, T), psc.pack_down(w)]
    results.append(psc.SparseFFN(w, w, w, T)(x))
    return results


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_and_cupy_agree_to_the_bit(dtype, torch):
    for ours, theirs in zip(_through(OnCupy(), dtype), _through(OnTorch(), dtype), strict=True):
        assert isinstance(theirs, torch.Tensor) and theirs.is_cuda
        assert theirs.dtype == getattr(torch, dtype) and tuple(theirs.shape) == ours.shape
        np.testing.assert_array_equal(bits(OnCupy().get(ours)), bits(OnTorch().get(theirs)))


def _through_other_formulas(library):
    """Every operator's result with an activation, biases and a norm, in one library; and with a bias that is not aligned."""
    g, x, x1, w = (library.put(a) for a in _numbers())
    rng = np.random.default_rng(3)
    bias, down, norm = (token(n, "bfloat16", rng) for n in (D_FF + 1, D_MODEL, D_FF))
    bias, down, norm = library.put(bias)[1:], library.put(down), library.put(norm)
    both, last = {"gate_bias": bias, "up_bias": bias}, {"down_bias": down, "norm_weight": norm, "norm_eps": 1e-5}
    return [
        psc.ffn_1(x, w, bias=bias),
        psc.ffn_12(x, w, T, activation="relu2", bias=bias),
        psc.ffn_23(g, x, w, T, activation="drelu", bias=bias),
        psc.ffn_123(x, w, w, T, activation="drelu", **both),
        psc.ffn_4(x1, w, bias=down, norm_weight=norm, norm_eps=1e-5),
        psc.sparse_ffn(x, w, w, w, T, activation="relu2", **both, **last),
        psc.SparseFFN(w, w, w, T, activation="relu2", **both, **last)(x),
        psc.sparse_ffn(x, None, w, w, T, activation="relu2", up_bias=bias, **last),
        psc.SparseFFN(None, w, w, T, activation="relu2", up_bias=bias, **last)(x),
        psc.SparseFFN(None, psc.compress(w), psc.compress(w), T, activation="relu2", up_bias=bias, **last)(x),
    ]


def test_torch_and_cupy_agree_to_the_bit_in_other_formulas(torch):
    ours, theirs = (_through_other_formulas(library) for library in (OnCupy(), OnTorch()))
    for one, other in zip(ours, theirs, strict=True):
        assert isinstance(other, torch.Tensor) and other.is_cuda
        np.testing.assert_array_equal(bits(OnCupy().get(one)), bits(OnTorch().get(other)))
    for one, other in ((5, 6), (7, 8), (8, 9)):
        np.testing.assert_array_equal(bits(OnCupy().get(ours[one])), bits(OnCupy().get(ours[other])))


def test_other_formulas_through_dlpack():
    on = OnCupy()
    _, x, _, w = (on.put(a) for a in _numbers())
    bias = on.put(token(D_FF, "bfloat16", np.random.default_rng(3)))
    expected = psc.SparseFFN(None, w, w, T, activation="relu2", up_bias=bias)(x)
    ffn = psc.SparseFFN(None, Exporter(w), Exporter(w), T, activation="relu2", up_bias=Exporter(bias))
    np.testing.assert_array_equal(bits(on.get(ffn(Exporter(x)))), bits(on.get(expected)))
    found = psc.ffn_12(Exporter(x), Exporter(w), T, activation="relu2", bias=Exporter(bias))
    np.testing.assert_array_equal(bits(on.get(found)), bits(on.get(psc.ffn_12(x, w, T, activation="relu2", bias=bias))))


def test_parameters_and_out_on_torch(torch):
    to = OnTorch()
    g, x, _, w = (to.put(a) for a in _numbers())
    out = to.put(poisoned(D_FF, "bfloat16"))
    assert psc.ffn_23(g, x, torch.nn.Parameter(w), T, out=out) is out
    np.testing.assert_array_equal(bits(to.get(out)), bits(OnCupy().get(_through(OnCupy())[1])))


def test_torch_results_come_from_torchs_allocator(torch):
    to = OnTorch()
    g, x, _, w = (to.put(a) for a in _numbers())
    psc.ffn_23(g, x, w, T)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    out = psc.ffn_23(g, x, w, T)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before + 1
    psc.ffn_23(g, x, w, T, out=out)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before + 1


class Namespaced(Exporter):
    """One whose library has the array API's from_dlpack."""

    def __array_namespace__(self):
        return type("namespace", (), {"from_dlpack": staticmethod(Namespaced)})


@pytest.mark.parametrize("dtype", DTYPES)
def test_dlpack(dtype):
    import cupy

    on = OnCupy()
    g, x, _, w = (on.put(a) for a in _numbers(dtype))
    expected = on.get(psc.ffn_23(g, x, w, T))
    result = psc.ffn_23(Exporter(g), Exporter(x), Exporter(w), T)
    assert isinstance(result, cupy.ndarray)
    np.testing.assert_array_equal(bits(on.get(result)), bits(expected))
    result = psc.ffn_23(Namespaced(g), Namespaced(x), Namespaced(w), T)
    assert isinstance(result, Namespaced)
    np.testing.assert_array_equal(bits(on.get(result.array)), bits(expected))
    out = Exporter(on.put(poisoned(D_FF, dtype)))
    assert psc.ffn_23(Exporter(g), Exporter(x), Exporter(w), T, out=out) is out
    np.testing.assert_array_equal(bits(on.get(out.array)), bits(expected))


def test_misaligned_and_overlapping_device_arrays(torch):
    for library in (OnCupy(), OnTorch()):
        g, x, x1, w = (library.put(a) for a in _numbers())
        buffer = library.put(poisoned(D_MODEL + 8, "bfloat16"))
        with pytest.raises(ValueError, match="ffn_23: x must start at a multiple of 16 bytes"):
            psc.ffn_23(g, buffer[1 : D_MODEL + 1], w, T)
        with pytest.raises(ValueError, match="ffn_4: out must start at a multiple of 16 bytes"):
            psc.ffn_4(x1, w, out=buffer[1 : D_MODEL + 1])
        with pytest.raises(ValueError, match="ffn_23: out must not share memory with gate"):
            psc.ffn_23(g, x, w, T, out=g)
        assert np.isnan(library.get(buffer).astype(np.float32)).all()
        shifted = library.put(poisoned(D_FF + 8, "bfloat16"))[8:]
        psc.ffn_23(g, x, w, T, out=shifted)
        np.testing.assert_array_equal(bits(library.get(shifted)), bits(library.get(psc.ffn_23(g, x, w, T))))


def test_mixed_device_libraries(torch):
    g, x, _, w = _numbers()
    with pytest.raises(TypeError, match=r"one library, got .*w_up is torch"):
        psc.ffn_23(OnCupy().put(g), OnCupy().put(x), OnTorch().put(w))
    with pytest.raises(TypeError, match=r"one library, got .*x is numpy"):
        psc.ffn_23(OnCupy().put(g), x, OnCupy().put(w))


def _keep_busy(cupy):
    """A second of work that an operator on this stream must wait for: it writes x at its end."""
    return cupy.RawKernel(
        r"""extern "C" __global__ void late_copy(const short* from, short* to, int n, long long cycles) {
            const long long start = clock64();
            while (clock64() - start < cycles) {}
            for (int i = threadIdx.x; i < n; i += blockDim.x) to[i] = from[i];
        }""",
        "late_copy",
    )


def test_launches_follow_cupys_current_stream():
    import cupy

    on = OnCupy()
    g, x, _, w = (on.put(a) for a in _numbers())
    expected = on.get(psc.ffn_23(g, x, w, T))
    late_x, late = cupy.zeros_like(x), _keep_busy(cupy)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        late((1,), (256,), (x, late_x, np.int32(D_MODEL), np.int64(200_000_000)))
        out = psc.ffn_23(g, late_x, w, T)
        assert not stream.done, "the launch waited"
    stream.synchronize()
    np.testing.assert_array_equal(bits(on.get(out)), bits(expected))


class TorchStream:
    """A torch stream under the CUDA stream protocol."""

    def __init__(self, stream):
        self.stream = stream

    def __cuda_stream__(self):
        return 0, self.stream.cuda_stream


def test_launches_follow_torchs_current_stream(torch):
    import cupy

    to = OnTorch()
    g, x, _, w = (to.put(a) for a in _numbers())
    expected = to.get(psc.ffn_23(g, x, w, T))
    late_x, late = torch.zeros_like(x), _keep_busy(cupy)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        with cupy.cuda.Stream.from_external(TorchStream(stream)):
            late((1,), (256,), (x.data_ptr(), late_x.data_ptr(), np.int32(D_MODEL), np.int64(200_000_000)))
        out = psc.ffn_23(g, late_x, w, T)
        assert not stream.query(), "the launch waited"
    stream.synchronize()
    np.testing.assert_array_equal(bits(to.get(out)), bits(expected))


def _sparse_calls(layer, weights_on_gpu, x, y):
    ffn = psc.SparseFFN(*weights_on_gpu, layer.threshold)
    return [lambda: ffn(x, out=y), lambda: psc.sparse_ffn(x, *weights_on_gpu, layer.threshold, out=y)]


def _two_tokens():
    layer = synthetic.layer(D_MODEL, D_FF, DTYPES["bfloat16"], 0.8, T, np.random.default_rng(1))
    return layer, [layer.x, token(D_MODEL, "bfloat16", np.random.default_rng(2))]


def test_cupy_graph_replays_with_changed_inputs():
    import cupy

    on = OnCupy()
    layer, tokens = _two_tokens()
    ws = [on.put(a) for a in (layer.w_gate, layer.w_up, layer.w_down.T.copy())]
    expected = [on.get(psc.sparse_ffn(on.put(t), *ws, T)) for t in tokens]
    x, y = on.put(tokens[0]), on.put(poisoned(D_MODEL, "bfloat16"))
    for call in _sparse_calls(layer, ws, x, y):
        call()
        stream = cupy.cuda.Stream(non_blocking=True)
        cupy.cuda.Device().synchronize()
        with stream:
            stream.begin_capture()
            call()
            graph = stream.end_capture()
            for t, right in zip(tokens * 2, expected * 2, strict=True):
                x.set(t, stream=stream)
                y.fill(float("nan"))
                graph.launch(stream)
                stream.synchronize()
                np.testing.assert_array_equal(bits(on.get(y)), bits(right))


def test_torch_graph_replays_with_changed_inputs(torch):
    to = OnTorch()
    layer, tokens = _two_tokens()
    ws = [to.put(a) for a in (layer.w_gate, layer.w_up, layer.w_down.T.copy())]
    expected = [to.get(psc.sparse_ffn(to.put(t), *ws, T)) for t in tokens]
    x, y = to.put(tokens[0]), to.put(poisoned(D_MODEL, "bfloat16"))
    for call in _sparse_calls(layer, ws, x, y):
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        for t, right in zip(tokens * 2, expected * 2, strict=True):
            x.copy_(to.put(t))
            y.fill_(float("nan"))
            graph.replay()
            np.testing.assert_array_equal(bits(to.get(y)), bits(right))


def test_a_captured_sparse_ffn_does_not_share_scratch_with_later_calls():
    import cupy

    on = OnCupy()
    layer, tokens = _two_tokens()
    ws = [on.put(a) for a in (layer.w_gate, layer.w_up, layer.w_down.T.copy())]
    x, y = on.put(tokens[0]), on.put(poisoned(D_MODEL, "bfloat16"))
    expected = on.get(psc.sparse_ffn(x, *ws, T))
    stream, other = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    cupy.cuda.Device().synchronize()
    with stream:
        psc.sparse_ffn(x, *ws, T, out=y)
        stream.begin_capture()
        psc.sparse_ffn(x, *ws, T, out=y)
        graph = stream.end_capture()
        second, y2 = on.put(tokens[1]), on.put(poisoned(D_MODEL, "bfloat16"))
        stream.synchronize()
        for _ in range(200):
            graph.launch(other)
            psc.sparse_ffn(second, *ws, T, out=y2)
        other.synchronize()
        stream.synchronize()
    np.testing.assert_array_equal(bits(on.get(y)), bits(expected))


def test_the_bits_do_not_depend_on_thread_or_stream():
    import cupy

    on = OnCupy()
    _, _, x1, w = (on.put(a) for a in _numbers())
    expected = on.get(psc.ffn_4(x1, w))
    results: list[np.ndarray] = []

    def work():
        with cupy.cuda.Stream(non_blocking=True) as stream:
            out = psc.ffn_4(x1, w)
            stream.synchronize()
        results.append(on.get(out))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for result in results:
        np.testing.assert_array_equal(bits(result), bits(expected))


def test_warmup_makes_a_capture_possible():
    import cupy

    on = OnCupy()
    d_model, d_ff = 104, 57
    report = psc.warmup(d_model, d_ff)
    kernels = ["ffn_1", "ffn_123", "ffn_23", "ffn_4", "pack_down"]
    if any("EARLY_SUCCESSOR" in c.defines for c in report):  # in a whole FFN, where the GPU can do that
        kernels.insert(2, "ffn_123")
    assert [c.kernel for c in report] == kernels
    assert all(c.seconds > 0 and f"ROW_OPT={d_ff} COL_OPT={d_model}" in c.defines for c in report)
    x, w = on.put(token(d_model, "bfloat16", np.random.default_rng())), on.put(weights(d_ff, d_model, "bfloat16"))
    y = on.put(poisoned(d_model, "bfloat16"))
    ffn = psc.SparseFFN(w, w, w)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        ffn(x, out=y)
        graph = stream.end_capture()
        graph.launch(stream)
        stream.synchronize()
    np.testing.assert_array_equal(bits(on.get(y)), bits(on.get(psc.sparse_ffn(x, w, w, w))))


def test_a_kernel_that_does_not_compile_says_everything(monkeypatch):
    from prosparse_cupy import compiler

    monkeypatch.setattr(compiler, "source", lambda kernel: f'extern "C" __global__ void {kernel}() {{ no_such_thing(); }}')
    plan = plan_of("ffn_4", Shape(64, 64, "bfloat16"))
    with pytest.raises(psc.KernelCompileError) as caught:
        compiler.Kernel(plan, 0)
    message = str(caught.value)
    assert all(word in message for word in ("ffn_4", "NVRTC", "sm_", "-DROW_OPT=64", "no_such_thing", "undefined"))


def test_gpus_older_than_ampere_are_refused_by_name(monkeypatch):
    import cupy

    from prosparse_cupy import device

    old = {"name": b"Tesla T4", "major": 7, "minor": 5}
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceProperties", lambda index: old)
    with pytest.raises(psc.UnsupportedGPUError, match=r"Tesla T4, has compute capability 7\.5; the kernels need 8\.0"):
        device.gpu.__wrapped__(0)
