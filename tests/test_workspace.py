"""Scratch memory: threads, streams, graphs, and what is left of them. On a driver that only notes, and on a GPU."""

from __future__ import annotations

import contextlib
import copy
import gc
import sys
import threading
import time
from collections.abc import Callable
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import pytest
from checks import DTYPES, bits, norm_weight, poisoned, token, weights
from gpu_arrays import OnCupy, OnTorch

import prosparse_cupy as psc
from prosparse_cupy import workspace
from prosparse_cupy.testing import synthetic

KIB = 1024


class _Runtime:
    """CUDA's memory and streams as far as scratch sees them."""

    class CUDARuntimeError(RuntimeError):
        def __init__(self, status: int) -> None:
            super().__init__(f"status {status}")
            self.status = status

    def __init__(self) -> None:
        self.ids, self.allocated, self.marks, self.events = {}, [], [], []
        self.full = 0  # allocations that fail from now on
        self.happened: set[int] = set()  # streams whose events have happened

    def malloc(self, nbytes: int) -> int:
        if self.full:
            self.full -= 1
            raise self.CUDARuntimeError(2)
        self.allocated.append(nbytes)
        return 0x1000 * len(self.allocated)

    def eventRecord(self, event: _Event, stream: int) -> None:
        event.stream = stream
        self.events.append((stream, "recorded"))


class _Event:
    """A CUDA event: its stream is its address here."""

    def __init__(self, runtime: _Runtime, disable_timing: bool) -> None:
        self.runtime, self.ptr, self.stream = runtime, self, None

    @property
    def done(self) -> bool:
        return self.stream in self.runtime.happened


class _Mark:
    def __init__(self, runtime: _Runtime) -> None:
        self.destroyed = self.freed = False
        runtime.marks.append(self)

    def is_set(self) -> bool:
        return self.destroyed

    def free(self) -> None:
        assert self.destroyed and not self.freed
        self.freed = True


@pytest.fixture
def cuda(monkeypatch):
    """A workspace of its own on a made-up driver."""
    runtime = _Runtime()
    pool = SimpleNamespace(free_all_blocks=lambda: runtime.events.append("CuPy's cache freed"))
    cuda = SimpleNamespace(runtime=runtime, Device=lambda index: contextlib.nullcontext(), Event=partial(_Event, runtime))
    cupy = SimpleNamespace(
        cuda=cuda,
        get_default_memory_pool=lambda: pool,
    )
    monkeypatch.setattr(workspace, "cupy", lambda: cupy)
    fake = SimpleNamespace(
        stream_id=lambda stream: runtime.ids.get(stream, stream),
        DestructionMark=lambda stream: _Mark(runtime),
        allowed_during_captures=contextlib.nullcontext,
        LEGACY=1,
    )
    monkeypatch.setattr(workspace, "driver", fake)
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in ("_homes", "_graphs", "_passing", "_idle"):
        monkeypatch.setattr(workspace, name, copy.copy(getattr(workspace, name)))
        getattr(workspace, name).clear()
    runtime.driver = fake
    return runtime


def _use(stream: int, nbytes: int = 4 * KIB, device: int = 0, captured: bool = False) -> int:
    """The address that a call on `stream` gets, given back."""
    address, home = workspace.take(stream, device, nbytes, captured)
    home.append(address)
    return address


def test_a_stream_reuses_its_scratch(cuda):
    for stream in (0, 1, 7, 8):
        assert _use(stream) == _use(stream)
    assert _use(0) == _use(1), "two names of the legacy default stream"
    assert len({_use(0), _use(7), _use(8)}) == 3 and len(cuda.allocated) == 3


def test_what_differs_does_not_share(cuda):
    addresses = [_use(7), _use(7, nbytes=8 * KIB), _use(7, device=1), _use(0), _use(0, device=1)]
    assert len(set(addresses)) == 5 and cuda.allocated == [4 * KIB, 8 * KIB, 4 * KIB, 4 * KIB, 4 * KIB]


def test_calls_at_the_same_time_do_not_share(cuda):
    taken = [workspace.take(0, 0, 4 * KIB, False) for _ in range(3)]
    assert len({address for address, _ in taken}) == 3
    for address, home in taken:
        home.append(address)
    assert {_use(0) for _ in range(9)} <= {address for address, _ in taken} and len(cuda.allocated) == 3


def test_a_handle_that_is_given_out_again_is_another_stream(cuda):
    cuda.ids[7] = 100
    first = _use(7)
    cuda.ids[7] = 101
    assert _use(7) != first


def test_a_graph_keeps_its_scratch_until_it_is_destroyed(cuda):
    eager = _use(7)
    captured = [_use(7, captured=True), _use(7, captured=True)]
    assert len({eager, *captured}) == 3 and [m.destroyed for m in cuda.marks] == [False, False]
    cuda.marks[0].destroyed = True
    again = _use(7, captured=True)
    assert again == captured[0] and cuda.marks[0].freed and not cuda.marks[1].freed
    for _ in range(50):
        for mark in cuda.marks:
            mark.destroyed = True
        _use(7, captured=True)
    assert len(cuda.allocated) == 3
    assert _use(7) == eager


def test_a_graph_that_cannot_own_is_an_error_and_loses_nothing(cuda):
    def refuse(stream):
        raise RuntimeError("no user objects")

    cuda.driver.DestructionMark = refuse
    for _ in range(3):
        with pytest.raises(RuntimeError, match="no user objects"):
            workspace.take(7, 0, 4 * KIB, True)
    assert cuda.allocated == [4 * KIB] and not workspace._graphs


def test_streams_beyond_the_first_share_what_is_certainly_free(cuda, monkeypatch):
    monkeypatch.setattr(workspace, "_MOST_HOMES", 3)
    own = [_use(stream) for stream in (7, 8, 9)]
    assert cuda.events == []
    first = _use(10)
    assert cuda.events == [(10, "recorded")] and first not in own
    assert _use(11) != first, "the launches on stream 10 may still run, or stream 10 be gone"
    cuda.happened = {10, 11}
    assert _use(12) == first
    assert [_use(stream) for stream in (7, 8, 9)] == own
    for stream in range(13, 300):  # stream 12 runs on all the time
        _use(stream)
        cuda.happened.add(stream)
    assert len(cuda.allocated) <= 7
    assert _use(0) not in own, "the default stream always has its own"
    assert _use(0) == _use(0)


def test_out_of_memory(cuda):
    cuda.full = 1
    assert _use(7) and cuda.events == ["CuPy's cache freed"]
    cuda.full = 2
    with pytest.raises(MemoryError, match="GPU 0 has no 4096 bytes for an FFN's scratch: status 2"):
        _use(8)
    assert _use(8), "the next call works"


def test_out_of_memory_where_a_capture_forbids_to_free(cuda, monkeypatch):
    """torch refuses to empty its cache then, which must not be the error that the caller sees."""

    def refuse():
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(empty_cache=refuse)))
    cuda.full = 2
    with pytest.raises(MemoryError, match="GPU 0 has no 4096 bytes for an FFN's scratch: status 2"):
        workspace.take(7, 0, 4 * KIB, True)
    assert _use(7, captured=True) and len(workspace._graphs) == 1


def test_sizes_are_few():
    sizes = {workspace.size_class(n) for n in range(1, 300_000)}
    assert len(sizes) == 8 and all(workspace.size_class(n) >= n for n in (1, 4096, 4097, 22016, 240_000))


# On a GPU

on, to = OnCupy(), OnTorch()
D_MODEL, D_FF, T = 512, 3000, 0.01


def _layer(seed: int, d_ff: int = D_FF, dtype: str = "bfloat16"):
    """A layer's x, w_gate, w_up and w_down_t, and its result on an idle GPU."""
    layer = synthetic.layer(D_MODEL, d_ff, DTYPES[dtype], 0.8, T, np.random.default_rng(seed))
    arrays = [on.put(a) for a in (layer.x, layer.w_gate, layer.w_up, layer.w_down.T.copy())]
    return arrays, on.get(psc.sparse_ffn(*arrays, T))


def _as(library: str, arrays: list) -> list:
    import torch

    return [torch.from_dlpack(a) if library == "torch" else a for a in arrays]


def _callers(entry: str) -> list[tuple[Callable, np.ndarray]]:
    """Four callers of one entry point, each with numbers of its own: a call that returns y, and what y must be."""
    import torch

    from prosparse_cupy.torch import SparseGatedMLP

    how, library = entry.split()
    callers = []
    shared, _ = _layer(0)
    shared_ffn = psc.SparseFFN(*_as(library, shared[1:]), T)
    for seed in range(4):
        arrays, expected = _layer(seed)
        x, *ws = _as(library, arrays)
        if how == "sparse_ffn":
            callers.append((lambda x=x, ws=ws: psc.sparse_ffn(x, *ws, T), expected))
        elif how == "SparseFFN":
            expected = on.get(psc.sparse_ffn(arrays[0], *shared[1:], T))
            callers.append((lambda x=x: shared_ffn(x), expected))
        elif how == "op":
            callers.append((lambda x=x, ws=ws: torch.ops.prosparse.sparse_ffn(x, *ws, T), expected))
        else:
            mlp = SparseGatedMLP(D_MODEL, D_FF, T, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
            mlp.gate_proj.weight.copy_(ws[0])
            mlp.up_proj.weight.copy_(ws[1])
            mlp.down_proj.weight.copy_(ws[2].t())
            callers.append((lambda x=x, mlp=mlp: mlp(x), expected))
    return callers


def _run_in_threads(callers, around: Callable, calls: int = 100) -> int:
    """Wrong results of `calls` calls of each caller in a thread of its own, inside `around()`."""
    results, start = [[] for _ in callers], threading.Barrier(len(callers), timeout=60)
    failures = []

    def work(call, mine):
        try:
            with around():
                start.wait()
                mine += [call() for _ in range(calls)]
        except BaseException as error:
            failures.append(error)
            raise

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(c[0], r)) for c, r in zip(callers, results, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    import cupy

    cupy.cuda.Device().synchronize()
    assert not failures and all(len(mine) == calls for mine in results)
    get = on.get if hasattr(results[0][0], "get") else to.get
    return sum(not np.array_equal(bits(get(y)), bits(c[1])) for c, mine in zip(callers, results, strict=True) for y in mine)


@pytest.mark.gpu
@pytest.mark.parametrize("stream", ["default", "one side stream", "per thread"])
@pytest.mark.parametrize(
    "entry", ["sparse_ffn cupy", "SparseFFN cupy", "sparse_ffn torch", "SparseFFN torch", "op torch", "mlp torch"]
)
def test_threads_get_their_own_numbers(entry, stream, torch):
    import cupy

    side, torch_side = cupy.cuda.Stream(non_blocking=True), torch.cuda.Stream()
    on_torch = entry.endswith("torch")
    around = {
        "default": contextlib.nullcontext,
        "one side stream": lambda: torch.cuda.stream(torch_side) if on_torch else side,
        "per thread": lambda: torch.cuda.stream(torch.cuda.ExternalStream(2)) if on_torch else cupy.cuda.Stream.ptds,
    }[stream]
    assert _run_in_threads(_callers(entry), around) == 0


@pytest.mark.gpu
def test_threads_on_streams_of_their_own():
    import cupy

    assert _run_in_threads(_callers("SparseFFN cupy"), lambda: cupy.cuda.Stream(non_blocking=True)) == 0


def _without_a_gate(seed: int):
    """A layer's x, w_up and w_down_t, squared ReLU with biases and a norm, and its result on an idle GPU."""
    rng = np.random.default_rng(seed)
    x, w_up, w_down_t = (
        on.put(a) for a in (token(D_MODEL, "bfloat16", rng), *(weights(D_FF, D_MODEL, "bfloat16", s) for s in (0, 1)))
    )
    extras = {"up_bias": token(D_FF, "bfloat16", rng), "down_bias": token(D_MODEL, "bfloat16", rng)}
    extras = {name: on.put(a) for name, a in {**extras, "norm_weight": norm_weight(D_FF, "bfloat16", rng)}.items()}
    options = {"activation": "relu2", "norm_eps": 1e-5}
    return (x, w_up, w_down_t), extras, options, on.get(psc.sparse_ffn(x, None, w_up, w_down_t, **extras, **options))


@pytest.mark.gpu
def test_threads_of_an_ffn_without_a_gate_get_their_own_numbers():
    """One SparseFFN and four tokens."""
    (_, *ws), extras, options, _ = _without_a_gate(0)
    ffn, xs = (
        psc.SparseFFN(None, *ws, **extras, **options),
        [on.put(token(D_MODEL, "bfloat16", np.random.default_rng(s))) for s in range(4)],
    )
    callers = [(lambda x=x: ffn(x), on.get(psc.sparse_ffn(x, None, *ws, **extras, **options))) for x in xs]
    assert len({expected.tobytes() for _, expected in callers}) == 4
    assert _run_in_threads(callers, contextlib.nullcontext) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_a_stream_destroyed_with_work_in_flight(library, torch):
    """Its handle is given out again at once, so a new stream runs beside the old one under the same handle.

    A wide FFN reads 0.7 GB. A narrow one of as many neurons, launched on the next stream, is done in the middle of it. The
    streams that are made and destroyed beforehand leave the driver with some to reuse: that hung 6 of 75 processes whose
    launches were programmatic.
    """
    import cupy

    for stream in [cupy.cuda.Stream(non_blocking=True) for _ in range(40)]:
        with stream:
            cupy.zeros(64)
    cupy.cuda.Device().synchronize()
    del stream
    d_ff, generator = 11008, cupy.random.RandomState(0)
    calls, outs, handles = [], [], set()
    for d_model in (16384, 64):
        w = (generator.standard_normal((d_ff, d_model), dtype=np.float32) / d_model**0.5).astype(np.float16)
        xs = [generator.standard_normal(d_model, dtype=np.float32).astype(np.float16) for _ in range(3)]
        expected = [on.get(psc.sparse_ffn(x, w, w, w)) for x in xs]
        assert len({e.tobytes() for e in expected}) == 3
        calls.append((_as(library, [w]) * 3, _as(library, xs), expected))
    targets = [[cupy.full(len(xs[0]), np.nan, np.float16) for _ in range(15)] for _, xs, _ in calls]
    given = [_as(library, mine) for mine in targets]
    cupy.cuda.Device().synchronize()
    for i in range(15):
        for (ws, xs, expected), mine, target in zip(calls, given, targets, strict=True):
            stream = cupy.cuda.Stream(non_blocking=True)
            handles.add(stream.ptr)
            with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)) if library == "torch" else stream:
                psc.sparse_ffn(xs[i % 3], *ws, out=mine[i])
            outs.append((target[i], expected[i % 3]))
            del stream
    cupy.cuda.Device().synchronize()
    assert len(handles) < 30, "no handle was given out twice, so nothing was tried"
    assert sum(not np.array_equal(bits(on.get(out)), bits(right)) for out, right in outs) == 0


@pytest.mark.gpu
def test_a_sparse_ffn_dropped_while_a_side_stream_runs_it(torch):
    layers = [_layer(seed, 11008) for seed in range(2)]
    side, outs = torch.cuda.Stream(), []
    given = [_as("torch", arrays) for arrays, _ in layers]
    torch.cuda.synchronize()
    for i in range(40):
        x, *ws = given[i % 2]
        out = torch.full_like(x, float("nan"))
        ffn = psc.SparseFFN(*ws, T)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(200_000)
            ffn(x, out=out)
        del ffn
        foreign = torch.full((11008,), 7.0, dtype=torch.bfloat16, device="cuda")  # takes what was freed, on another stream
        outs.append((out, foreign))
    torch.cuda.synchronize()
    for i, (out, foreign) in enumerate(outs):
        np.testing.assert_array_equal(bits(to.get(out)), bits(layers[i % 2][1]))
        assert bool((foreign == 7).all())


@cache
def _stream_of_captures():
    import cupy

    return cupy.cuda.Stream(non_blocking=True)


def _capture(library: str, by: str, call: Callable):
    """A CUDA graph of `call`, captured by CuPy or torch: a function that launches it."""
    import cupy
    import torch

    if by == "torch":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay
    stream = _stream_of_captures()
    with stream, torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)) if library == "torch" else contextlib.nullcontext():
        stream.begin_capture()
        call()
        graph = stream.end_capture()
    return lambda: graph.launch(cupy.cuda.Stream.null)


CAPTURES = pytest.mark.parametrize(("library", "by"), [("cupy", "cupy"), ("torch", "cupy"), ("torch", "torch")])


@pytest.mark.gpu
@CAPTURES
def test_a_graph_outlives_what_it_was_captured_from(library, by, torch):
    import cupy

    arrays, expected = _layer(0)
    x, *ws = _as(library, arrays)
    (out,) = _as(library, [on.put(poisoned(D_MODEL, "bfloat16"))])

    def captured():
        ffn = psc.SparseFFN(*ws, T)
        ffn(x, out=out)
        cupy.cuda.Device().synchronize()
        return _capture(library, by, lambda: ffn(x, out=out))

    replay = captured()
    gc.collect()
    # Whatever was freed is now somebody else's.
    others = [cupy.full(D_FF, 7, np.float16) for _ in range(200)]
    tensors = [torch.full((D_FF,), 7.0, dtype=torch.bfloat16, device="cuda") for _ in range(200)]
    for _ in range(3):
        out[...] = float("nan")
        cupy.cuda.Device().synchronize()
        replay()
        cupy.cuda.Device().synchronize()
        np.testing.assert_array_equal(bits((to if library == "torch" else on).get(out)), bits(expected))
    assert all(bool((a == 7).all()) for a in (*others, *tensors))


@pytest.mark.gpu
@CAPTURES
def test_a_graph_of_an_ffn_without_a_gate_sees_what_its_arrays_hold(library, by, torch):
    """The token, the biases and the norm's weight are read at every launch."""
    import cupy

    (x, *ws), extras, options, expected = _without_a_gate(0)
    (x2, *_), extras2, _, _ = _without_a_gate(1)
    expected2 = on.get(psc.sparse_ffn(x2, None, *ws, **extras2, **options))
    out = on.put(poisoned(D_MODEL, "bfloat16"))
    given = dict(zip(extras, _as(library, list(extras.values())), strict=True))
    ffn, (token_, target) = psc.SparseFFN(None, *_as(library, ws), **given, **options), _as(library, [x, out])
    ffn(token_, out=target)
    cupy.cuda.Device().synchronize()
    replay = _capture(library, by, lambda: ffn(token_, out=target))
    for right, x_now, extras_now in ((expected, None, None), (expected2, x2, extras2)):
        if x_now is not None:
            x[...] = x_now
            for name, array in extras_now.items():
                extras[name][...] = array
        out[...] = float("nan")
        cupy.cuda.Device().synchronize()
        replay()
        cupy.cuda.Device().synchronize()
        np.testing.assert_array_equal(bits(on.get(out)), bits(right))
    assert np.any(bits(expected) != bits(expected2))


@pytest.mark.gpu
@CAPTURES
def test_graphs_made_and_dropped_leave_nothing(library, by, torch):
    import cupy

    arrays, expected = _layer(0)
    x, *ws = _as(library, arrays)
    (out,) = _as(library, [on.put(poisoned(D_MODEL, "bfloat16"))])
    ffn, owned = psc.SparseFFN(*ws, T), []
    cupy.cuda.Device().synchronize()
    for _ in range(25):
        replay = _capture(library, by, lambda: [ffn(x, out=out) for _ in range(4)])
        replay()
        cupy.cuda.Device().synchronize()
        del replay
        gc.collect()
        time.sleep(0.01)  # the driver tells in a thread of its own
        owned.append(len(workspace._graphs) + sum(map(len, workspace._idle.values())))
    assert owned[-1] <= owned[9] + 4, owned
    np.testing.assert_array_equal(bits((to if library == "torch" else on).get(out)), bits(expected))


@pytest.mark.gpu
def test_graphs_and_calls_side_by_side():
    """Three graphs of one SparseFFN and calls on four streams, all at the same time."""
    import cupy

    arrays, _ = _layer(0)
    ffn = psc.SparseFFN(*arrays[1:], T)
    tokens = [on.put(token(D_MODEL, "bfloat16", np.random.default_rng(seed))) for seed in range(7)]
    expected = [on.get(ffn(x)) for x in tokens]
    outs = [on.put(poisoned(D_MODEL, "bfloat16")) for _ in tokens]
    graphs = []
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in tokens]
    cupy.cuda.Device().synchronize()
    for i in range(3):
        with streams[i]:
            streams[i].begin_capture()
            ffn(tokens[i], out=outs[i])
            graphs.append(streams[i].end_capture())
    for _ in range(200):
        for i, stream in enumerate(streams):
            if i < 3:
                graphs[i].launch(stream)
            else:
                with stream:
                    ffn(tokens[i], out=outs[i])
    cupy.cuda.Device().synchronize()
    for out, right in zip(outs, expected, strict=True):
        np.testing.assert_array_equal(bits(on.get(out)), bits(right))


@pytest.mark.gpu
def test_a_first_call_while_another_thread_captures():
    """It allocates scratch, which CUDA forbids during a capture of mode global unless the thread says that it knows."""
    import cupy

    arrays, expected = _layer(0)
    stream, results = cupy.cuda.Stream(non_blocking=True), []
    cupy.cuda.Device().synchronize()

    def call():
        with cupy.cuda.Stream(non_blocking=True) as own:
            out = cupy.empty(D_MODEL, DTYPES["bfloat16"])
            results.append(out)
            psc.sparse_ffn(*arrays, T, out=out)
            own.synchronize()

    with stream:
        stream.begin_capture(cupy.cuda.runtime.streamCaptureModeRelaxed)
        other = threading.Thread(target=call)
        other.start()
        other.join()
        out = results[0]
        psc.sparse_ffn(*arrays, T, out=out)
        graph = stream.end_capture()
        np.testing.assert_array_equal(bits(on.get(out)), bits(expected))
        out.fill(float("nan"))
        graph.launch(stream)
        stream.synchronize()
    np.testing.assert_array_equal(bits(on.get(out)), bits(expected))


@pytest.mark.gpu
def test_more_streams_than_have_scratch_of_their_own(monkeypatch):
    """Each with launches in flight when it is destroyed, and beside a capture, which asking for an event must not break."""
    import cupy

    monkeypatch.setattr(workspace, "_homes", {})
    monkeypatch.setattr(workspace, "_MOST_HOMES", 4)
    layers = [_layer(seed, 11008) for seed in range(3)]
    outs = [on.put(poisoned(D_MODEL, "bfloat16")) for _ in range(24)]
    captured, capturing = on.put(poisoned(D_MODEL, "bfloat16")), cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with capturing:
        capturing.begin_capture()
        psc.sparse_ffn(*layers[0][0], T, out=captured)
    for i, out in enumerate(outs):
        with cupy.cuda.Stream(non_blocking=True):
            psc.sparse_ffn(*layers[i % 3][0], T, out=out)
    with capturing:
        graph = capturing.end_capture()
        graph.launch(capturing)
    cupy.cuda.Device().synchronize()
    for i, out in enumerate(outs):
        np.testing.assert_array_equal(bits(on.get(out)), bits(layers[i % 3][1]))
    np.testing.assert_array_equal(bits(on.get(captured)), bits(layers[0][1]))
    assert workspace._passing[0, workspace.size_class(2 * 11008)] and len(workspace._homes) <= 5
