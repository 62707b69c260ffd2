"""What nobody should do, and somebody does: threads, forks, captures, full memory, broken caches, many streams, two GPUs.

What could hang or end the process runs in a process of its own, which has a time limit.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from checks import DTYPES, bits, poisoned, token, weights
from gpu_arrays import OnCupy, OnTorch

import prosparse_cupy as psc
from prosparse_cupy import compiler, libraries, reference, workspace
from prosparse_cupy.formats import PLAIN
from prosparse_cupy.problem import H100, Problem
from prosparse_cupy.testing import synthetic

on, to = OnCupy(), OnTorch()
D_MODEL, D_FF, T = 512, 3000, 0.01


def _in_a_process(function: Callable, *arguments, timeout: int = 120, **environment: str) -> str:
    """What a function of this file prints in a Python of its own."""
    process = _started(function, *arguments, **environment)
    try:
        out, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # what it has forked, too
        pytest.fail(f"{function.__name__} hangs: {process.communicate()[1][-3000:]}")
    assert process.returncode == 0, f"status {process.returncode}: {errors[-3000:]}"
    return out


def _started(function: Callable, *arguments, **environment: str) -> subprocess.Popen:
    code = f"import test_abuse; test_abuse.{function.__name__}(*{arguments!r})"
    surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code], env=surroundings, text=True, start_new_session=True, **pipes)


def _in_threads(works: list[Callable[[], None]]) -> None:
    """Run these at the same time, and raise the first of their errors."""
    start, errors = threading.Barrier(len(works), timeout=60), []

    def run(work: Callable[[], None]) -> None:
        try:
            start.wait()
            work()
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(90)
    finally:
        sys.setswitchinterval(interval)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"


# Without a GPU


def test_threads_that_load_a_kernel_at_the_same_time_get_one(monkeypatch):
    """The others would be unloaded, and a graph may have captured what was launched."""
    made = []

    class Slow:
        def __init__(self, plan, device) -> None:
            made.append((plan.kernel, device))
            time.sleep(0.01)

    monkeypatch.setattr(compiler, "Kernel", Slow)
    monkeypatch.setattr(compiler, "target_of", lambda device: H100)
    compiler._forget_kernels()
    problems = [Problem(kernel, 64, 24, "bfloat16") for kernel in ("ffn_1", "ffn_4")]
    got: list[tuple[str, object]] = []  # a dict that makes what is missing would lose some of it between threads
    try:
        _in_threads([partial(lambda p: got.append((p.kernel, compiler.load(p, 0))), problems[i % 2]) for i in range(16)])
    finally:
        compiler._forget_kernels()
    assert sorted(made) == [("ffn_1", 0), ("ffn_4", 0)]
    assert sorted(kernel for kernel, _ in got) == ["ffn_1"] * 8 + ["ffn_4"] * 8 and len({*got}) == 2


class _Foreign:
    """Another library's array, as far as its type tells."""

    def __dlpack__(self, **options): ...
    def __dlpack_device__(self): ...


def test_threads_that_bring_a_library_at_the_same_time_agree_on_it(monkeypatch):
    """Families are compared by identity: with two for torch, a call with a tensor and a parameter could be refused."""
    real = libraries._Dlpack.__init__

    def slow(self, kind):
        time.sleep(0.01)
        real(self, kind)

    monkeypatch.setattr(libraries._Dlpack, "__init__", slow)
    got = []
    _in_threads([lambda: got.append(libraries.family_of(_Foreign))] * 16)
    assert len(got) == 16 and len({*map(id, got)}) == 1
    libraries.family_of.cache_clear()
    assert libraries.family_of(_Foreign) is got[0], "it is the same after it was forgotten"


def test_threads_that_bring_tensors_of_two_types_at_the_same_time_agree_on_torch(monkeypatch):
    torch = pytest.importorskip("torch", reason='the extra "torch" brings it')

    def slow(module):
        time.sleep(0.01)
        return object()

    monkeypatch.setattr(libraries, "_torch_family", cache(slow))
    kinds = [type(name, (torch.Tensor,), {}) for name in ("One", "Other")]
    got = []
    _in_threads([partial(lambda kind: got.append(libraries.family_of(kind)), kinds[i % 2]) for i in range(16)])
    assert len(got) == 16 and len({*map(id, got)}) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_is_told_so():
    assert _in_a_process(_forks_without_a_gpu, timeout=60).split() == ["refused"] * 4 + ["ran", "launched"]


def _forks_without_a_gpu() -> None:
    """A launch, known kernels and a new one are refused in the child, NumPy arrays are not, and the parent goes on.

    Another thread of the parent loads a kernel meanwhile, which the child must not wait for.
    """
    compiler._compile, compiler.target_of = lambda plan, device: _Function(), lambda device: H100
    compiler.cupy = lambda: _NoCupy
    compiler.launcher = lambda function, plan, device: lambda *arguments: print("launched", flush=True)
    problem, dims = Problem("ffn_4", 64, 24, "bfloat16", formats=(PLAIN,)), _Dims()
    kernel = compiler.load(problem, 0)
    assert compiler.kernel_of("ffn_4", dims, True) is kernel
    held, forked = threading.Event(), threading.Event()

    def hold() -> None:
        with compiler.loading():
            held.set()
            forked.wait()

    threading.Thread(target=hold, daemon=True).start()
    held.wait()
    child = os.fork()
    if child:
        forked.set()
        assert os.waitpid(child, 0)[1] == 0
        compiler.kernel_of("ffn_4", dims, True).launch(0, False)
        return
    try:
        known, new = (partial(compiler.load, replace(problem, d_ff=d_ff), 0) for d_ff in (24, 32))
        for call in (kernel.launch, lambda: known().launch(0, False), partial(compiler.kernel_of, "ffn_4", dims, True), new):
            try:
                call()
            except psc.NoGPUError as error:
                print("refused" if "spawn" in str(error) and "NumPy" in str(error) else error, flush=True)
        x, w = np.ones(64, np.float32), np.ones((24, 64), np.float32)
        assert psc.sparse_ffn(x, w, w, w).tolist() == [24 * 64.0 * 64.0] * 64
        print("ran", flush=True)
        os._exit(0)
    finally:
        os._exit(1)


class _Dims:
    """What `kernel_of` looks at of a checked call."""

    d_model, d_ff, dtype, device, tokens, formats, extras, partial = 64, 24, "bfloat16", 0, 1, (("W_DOWN", PLAIN),), (), False


class _Function:
    ptr = 0x1000


class _NoCupy:
    class cuda:
        Device = contextlib.nullcontext


# On a GPU


class Layer(NamedTuple):
    """A layer's arrays on the GPU, and its result there while nothing else runs."""

    x: Any
    ws: list
    expected: np.ndarray

    @property
    def call(self) -> tuple:
        return (self.x, *self.ws, T)


def _layer(seed: int, d_model: int = D_MODEL, d_ff: int = D_FF, dtype: str = "bfloat16", library: Any = on) -> Layer:
    made = _host_layer(seed, d_model, d_ff, dtype)
    x, *ws = map(library.put, made)
    return Layer(x, ws, library.get(_right(psc.sparse_ffn(x, *ws, T), made, library)))


def _host_layer(seed: int, d_model: int = D_MODEL, d_ff: int = D_FF, dtype: str = "bfloat16") -> tuple[np.ndarray, ...]:
    """x, w_gate, w_up and w_down_t."""
    layer = synthetic.layer(d_model, d_ff, DTYPES[dtype], 0.8, T, np.random.default_rng(seed))
    return layer.x, layer.w_gate, layer.w_up, layer.w_down.T.copy()


def _right(y: Any, made: tuple[np.ndarray, ...], library: Any) -> Any:
    """A result, which is near that of the reference."""
    exact = reference.sparse_ffn(*made, T).astype(np.float64)
    assert np.linalg.norm(library.get(y).astype(np.float64) - exact) <= 0.02 * np.linalg.norm(exact)
    return y


def _assert_same(found: Any, expected: np.ndarray, library: Any = on) -> None:
    np.testing.assert_array_equal(bits(library.get(found)), bits(expected))


@pytest.mark.gpu
def test_many_threads_make_the_first_call(tmp_path):
    assert _in_a_process(_first_calls, CUPY_CACHE_DIR=str(tmp_path)).strip() == "done"


@pytest.mark.gpu
def test_many_threads_make_the_first_call_of_modules(tmp_path, torch):
    assert _in_a_process(_first_calls_of_modules, CUPY_CACHE_DIR=str(tmp_path)).strip() == "done"


def _counted_compilations() -> Counter:
    compiled, real = Counter(), compiler._compile

    def compile_and_count(plan, device):
        compiled[plan.kernel] += 1
        return real(plan, device)

    compiler._compile = compile_and_count
    return compiled


def _first_calls() -> None:
    """Of a process whose cache on disk is empty: every kernel is compiled once, and all results are those of later calls."""
    compiled = _counted_compilations()
    arrays = [[on.put(a) for a in _host_layer(seed)] for seed in range(4)]
    results: list[list] = [[] for _ in range(16)]

    def calls(i: int) -> list:
        x, *ws = arrays[i % 4]
        g = psc.ffn_1(x, ws[0])
        return [psc.sparse_ffn(x, *ws, T), g, psc.ffn_23(g, x, ws[1], T), psc.SparseFFN(*ws, T)(x)]

    def work(i: int) -> None:
        results[i] = calls(i)

    _in_threads([partial(work, i) for i in range(16)])
    for i, mine in enumerate(results):
        for found, later in zip(mine, calls(i), strict=True):
            _assert_same(found, on.get(later))
        _right(mine[0], _host_layer(i % 4), on)
    assert compiled == {"ffn_1": 1, "ffn_123": 1, "ffn_23": 1, "ffn_4": 1}, compiled
    print("done")


def _module_of(x: Any, ws: list) -> Any:
    """A module with these weights."""
    from prosparse_cupy.torch import SparseGatedMLP

    mlp = SparseGatedMLP(len(x), len(ws[0]), T, device=x.device, dtype=x.dtype).requires_grad_(False)
    mlp.gate_proj.weight.copy_(ws[0])
    mlp.up_proj.weight.copy_(ws[1])
    mlp.down_proj.weight.copy_(ws[2].t())
    return mlp


def _first_calls_of_modules() -> None:
    """Tensors beside parameters: the operators run, with the bits that they have when called."""
    compiled = _counted_compilations()
    arrays = [[to.put(a) for a in _host_layer(seed)] for seed in range(4)]
    mlps, results = [_module_of(x, ws) for x, *ws in arrays], [None] * 16

    def work(i: int) -> None:
        results[i] = mlps[i % 4](arrays[i % 4][0])

    _in_threads([partial(work, i) for i in range(16)])
    for i, found in enumerate(results):
        x, *ws = arrays[i % 4]
        _assert_same(found, to.get(_right(psc.sparse_ffn(x, *ws, T), _host_layer(i % 4), to)), to)
    assert compiled == {"ffn_123": 1, "ffn_4": 1}, compiled
    print("done")


@contextlib.contextmanager
def _busy_gpu() -> Iterator[None]:
    """Meanwhile another thread keeps a stream of its own full of another FFN's launches and of another library's."""
    import cupy

    layer, began, stop, rounds = _layer(9, d_ff=11008), threading.Event(), threading.Event(), []

    def work() -> None:
        with cupy.cuda.Stream(non_blocking=True) as own:
            large = cupy.ones(1 << 26, np.float16)
            while not stop.is_set():
                outs = [psc.sparse_ffn(*layer.call) for _ in range(20)]
                for _ in range(4):
                    cupy.negative(large, out=large)
                own.synchronize()
                rounds.append(sum(not np.array_equal(bits(on.get(out)), bits(layer.expected)) for out in outs))
                began.set()

    cupy.cuda.Device().synchronize()
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        assert began.wait(60), "the other thread does not get on"
        yield
    finally:
        stop.set()
        thread.join(60)
    assert rounds and not any(rounds), "the other FFN is wrong too, or never ran"


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["calls", "graph"])
@pytest.mark.parametrize(
    ("d_model", "d_ff", "dtype", "tokens"), [(4096, 11008, "bfloat16", 1), (264, 1007, "float16", 3), (640, 5000, "float32", 8)]
)
def test_a_thousand_repeats_under_load(d_model, d_ff, dtype, tokens, how):
    import cupy

    rng = np.random.default_rng()
    x = on.put(np.stack([token(d_model, dtype, rng) for _ in range(tokens)]))
    ffn = psc.SparseFFN(*(on.put(weights(d_ff, d_model, dtype, seed)) for seed in range(3)), 0.25)
    expected = on.get(ffn(x))
    assert np.isfinite(expected.astype(np.float32)).all() and np.count_nonzero(expected) > expected.size / 2
    outs, out = on.put(poisoned((1000, *x.shape), dtype)), on.put(poisoned(x.shape, dtype))
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with _busy_gpu(), stream:
        if how == "calls":
            for i in range(1000):
                ffn(x, out=outs[i])
        else:
            stream.begin_capture()
            ffn(x, out=out)
            graph = stream.end_capture()
            for i in range(1000):
                graph.launch(stream)
                outs[i][...] = out
        stream.synchronize()
    found = bits(on.get(outs)).reshape(1000, -1)
    assert not (found != bits(expected).reshape(-1)).any(axis=1).sum()


class _Allocations:
    """Allocations of CuPy and of the driver, of which so many fail after so many."""

    def __init__(self, succeed: int, fail: int) -> None:
        import cupy

        self._left, self._fail, self.failed = succeed, fail, []
        self._cuda, self._pool, self._malloc = cupy.cuda, cupy.get_default_memory_pool(), cupy.cuda.runtime.malloc

    def _fails(self, whose: str) -> bool:
        self._left -= 1
        fails = -self._fail <= self._left < 0
        self.failed += [whose] * fails
        return fails

    def of_cupy(self, nbytes: int) -> Any:
        if self._fails("CuPy"):
            raise self._cuda.memory.OutOfMemoryError(nbytes, 0)
        memory = self._pool.malloc(nbytes)
        memory.memset_async(0xFF, nbytes)  # so that nobody takes an earlier call's results for its own
        return memory

    def of_driver(self, nbytes: int) -> int:
        if self._fails("driver"):
            raise self._cuda.runtime.CUDARuntimeError(2)  # cudaErrorMemoryAllocation
        return self._malloc(nbytes)


def _allocating_calls() -> dict[str, Callable[[], list]]:
    """Calls by name, each a list of arrays."""
    layer = _layer(0)
    x, (w_gate, w_up, w_down_t) = layer.x, layer.ws
    ffn, packed = psc.SparseFFN(*layer.ws, T), [psc.compress(w) for w in layer.ws]
    w_down = on.put(on.get(w_down_t).T.copy())

    def steps() -> list:
        g = psc.ffn_1(x, w_gate)
        x1 = psc.ffn_23(g, x, w_up, T)
        return [g, x1, psc.ffn_4(x1, w_down_t), psc.ffn_123(x, w_gate, w_up, T), psc.ffn_12(x, w_up, T)]

    return {
        "sparse_ffn": lambda: [psc.sparse_ffn(*layer.call)],
        "SparseFFN": lambda: [ffn(x)],
        "of compressed weights": lambda: [psc.SparseFFN(*packed, T)(x)],
        "one by one": steps,
        "pack_down": lambda: [psc.pack_down(w_down)],
        "compress": lambda: [*(made := psc.compress(w_up)).arrays, made.decompress()],
    }


@pytest.mark.gpu
@pytest.mark.parametrize("fail", [1, 10**9], ids=["one fails", "all fail from one on"])
@pytest.mark.parametrize("name", ["sparse_ffn", "SparseFFN", "of compressed weights", "one by one", "pack_down", "compress"])
def test_out_of_memory_in_every_allocation(name, fail, monkeypatch):
    """The call says so or does without, and the next one has the right bits."""
    import cupy

    call = _allocating_calls()[name]
    expected = [on.get(a) for a in call()]
    refused = 0
    for succeed in count():
        monkeypatch.setattr(workspace, "_homes", {})  # so that scratch has to be allocated
        monkeypatch.setattr(workspace, "_idle", defaultdict(list))
        allocations = _Allocations(succeed, fail)
        with monkeypatch.context() as patched, cupy.cuda.using_allocator(allocations.of_cupy):
            patched.setattr(cupy.cuda.runtime, "malloc", allocations.of_driver)
            try:
                results = [call()]
            except MemoryError:
                refused, results = refused + 1, []
            else:
                # CuPy's histogram counts in another way where CUB has no workspace.
                ways_out = [[], ["driver"], ["CuPy"]] if name == "compress" else [[], ["driver"]]
                assert allocations.failed in ways_out, "it went on without an array"
        for arrays in (*results, call()):
            for array, right in zip(arrays, expected, strict=True):
                _assert_same(array, right)
        if not allocations.failed:
            break
    assert refused >= len(expected)


@pytest.mark.gpu
def test_out_of_memory_in_a_capture(monkeypatch):
    """It is refused as outside of one, and the next capture works."""
    import cupy

    layer, out = _layer(0), on.put(poisoned(D_MODEL, "bfloat16"))
    stream = cupy.cuda.Stream(non_blocking=True)
    monkeypatch.setattr(workspace, "_idle", defaultdict(list))
    monkeypatch.setattr(workspace, "_graphs", [])
    cupy.cuda.Device().synchronize()
    for fail in (2, 0):
        allocations = _Allocations(0, fail)
        with monkeypatch.context() as patched, stream:
            patched.setattr(cupy.cuda.runtime, "malloc", allocations.of_driver)
            stream.begin_capture()
            with pytest.raises(MemoryError, match="bytes for an FFN's scratch") if fail else contextlib.nullcontext():
                psc.sparse_ffn(*layer.call, out=out)
            graph = stream.end_capture()
        assert len(allocations.failed) == fail
    graph.launch(stream)
    stream.synchronize()
    _assert_same(out, layer.expected)


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["operator", "torch op", "module"])
def test_out_of_memory_in_torch(how, torch):
    """torch gets no more of the GPU's memory, and what it has is taken."""
    import prosparse_cupy.torch  # noqa: F401  brings the ops

    layer = _layer(0, library=to)
    call = {
        "operator": partial(psc.sparse_ffn, *layer.call),
        "torch op": partial(torch.ops.prosparse.sparse_ffn, *layer.call),
        "module": partial(_module_of(layer.x, layer.ws), layer.x),
    }[how]
    hoard: list = []
    _assert_same(call(), layer.expected, to)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.0)
    try:
        for nbytes in (1 << 20, 1 << 16, 1 << 12, 512):
            with pytest.raises(torch.OutOfMemoryError):
                for _ in range(20_000):
                    hoard.append(torch.empty(nbytes, dtype=torch.uint8, device="cuda"))
        with pytest.raises(torch.OutOfMemoryError):
            call()
        hoard.clear()
        _assert_same(call(), layer.expected, to)
    finally:
        hoard.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)
    _assert_same(call(), layer.expected, to)


@pytest.mark.gpu
def test_out_of_memory_while_torchs_weights_are_compressed(torch):
    """What `compress` works with comes from CuPy, and the arrays that it returns from torch."""
    w = to.put(weights(D_FF, 2048, "bfloat16"))
    expected = [to.get(a) for a in psc.compress(w).arrays]
    pool = libraries.family_of(type(w))._pool
    pool.free_all_blocks()
    pool.set_limit(size=1 << 20)
    try:
        with pytest.raises(MemoryError):
            psc.compress(w)
    finally:
        pool.set_limit(size=0)
    for found, right in zip(psc.compress(w).arrays, expected, strict=True):
        _assert_same(found, right, to)


MODES = pytest.mark.parametrize("mode", [0, 1, 2], ids=["global", "thread local", "relaxed"])


@pytest.mark.gpu
@MODES
def test_a_capture_before_warmup(mode, tmp_path):
    assert _in_a_process(_captures_first, mode, CUPY_CACHE_DIR=str(tmp_path)).strip() in ("refused", "captured")


def _captures_first(mode: int) -> None:
    """The error names `warmup`, or the graph is right; after it, calls and captures work."""
    import cupy

    made = _host_layer(0)
    x, *ws = map(on.put, made)
    ffn, outs = psc.SparseFFN(*ws, T), [on.put(poisoned(D_MODEL, "bfloat16")) for _ in range(2)]
    stream, refusal = cupy.cuda.Stream(non_blocking=True), ""
    cupy.cuda.Device().synchronize()
    graphs = []
    with stream:
        stream.begin_capture(mode)
        try:
            ffn(x, out=outs[0])
        except psc.KernelCompileError as error:
            refusal = str(error)
        with contextlib.suppress(cupy.cuda.runtime.CUDARuntimeError):  # a capture that was broken
            graphs.append(stream.end_capture())
    expected = on.get(_right(ffn(x), made, on))
    if refusal:
        assert "before a graph capture, call warmup()" in refusal, refusal
        graphs.clear()
    assert bool(graphs) != bool(refusal)
    with stream:
        stream.begin_capture(mode)
        ffn(x, out=outs[1])
        graphs.append(stream.end_capture())
    for graph, out in zip(reversed(graphs), reversed(outs), strict=False):
        graph.launch(stream)
        stream.synchronize()
        _assert_same(out, expected)
    print("refused" if refusal else "captured")


@pytest.mark.gpu
@MODES
def test_captures_while_other_threads_call(mode):
    assert _in_a_process(_captures_beside_calls, mode).strip() == "done"


def _captures_beside_calls(mode: int) -> None:
    """Three threads call without a pause; a hundred captures or more, half of them dropped with their launch in flight."""
    import cupy

    layers, stop, rounds = [_layer(seed) for seed in range(4)], threading.Event(), Counter()
    outs = [[on.put(poisoned(D_MODEL, "bfloat16")) for _ in range(16)] for _ in layers]
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in layers]
    cupy.cuda.Device().synchronize()

    def calls(i: int) -> None:
        with streams[i]:
            while not stop.is_set():
                for out in outs[i]:
                    psc.sparse_ffn(*layers[i].call, out=out)
                rounds[i] += 1

    def captures() -> None:
        kept = []
        try:
            with streams[0]:
                for i in count():
                    if i >= 100 and all(rounds[j] > 1 for j in (1, 2, 3)):
                        break
                    streams[0].begin_capture(mode)
                    for out in outs[0][i % 8 :: 8]:
                        psc.sparse_ffn(*layers[0].call, out=out)
                    graph = streams[0].end_capture()
                    graph.launch(streams[0])
                    if i % 2 and i < 100:
                        kept.append(graph)
                for graph in kept:
                    graph.launch(streams[0])
                streams[0].synchronize()
        finally:
            stop.set()

    _in_threads([captures, *(partial(calls, i) for i in (1, 2, 3))])
    cupy.cuda.Device().synchronize()
    for layer, mine in zip(layers, outs, strict=True):
        for out in mine:
            _assert_same(out, layer.expected)
    print("done")


@pytest.mark.gpu
@pytest.mark.parametrize("captured", ["step", "calls"])
@pytest.mark.parametrize("with_care", [True, False])
def test_a_graph_in_garbage_does_not_spoil_a_capture(captured, with_care, torch_gpu):
    """And without the care it does, or the test would test nothing."""
    found = _in_a_process(_captures_with_a_graph_in_garbage, captured, with_care, TORCH_CUDAGRAPH_GC="0").split()
    assert found == ["captured", "collected"] if with_care else found[0] == "refused"


def _captures_with_a_graph_in_garbage(captured: str, with_care: bool) -> None:
    """Python would collect at the next objects that are made, which is while something is captured."""
    import torch

    from prosparse_cupy.testing import torch_dense
    from prosparse_cupy.torch import capture

    if not with_care:
        capture.without_collections = torch_dense.without_collections = contextlib.nullcontext
    gc.set_threshold(10**6)  # none before
    ones, x = torch.ones(4, device="cuda"), torch.zeros(4, device="cuda")
    garbage: list[Any] = [torch.cuda.CUDAGraph()]
    with torch.cuda.graph(garbage[0]):
        ones.add_(1)
    garbage[0].replay()
    garbage.append(garbage)
    dropped = weakref.ref(garbage[0])
    del garbage

    def function() -> None:
        if torch.cuda.is_current_stream_capturing():
            gc.set_threshold(10)
            assert len([[] for _ in range(1000)]) == 1000
        x.add_(1)

    try:
        if captured == "step":
            replay = capture.captured(function, x.device, function).replay
        else:
            replay = torch_dense.capture([function])
    except RuntimeError as error:
        print("refused", error)
        return
    replay()
    assert x.tolist() == [2.0] * 4
    assert len([[] for _ in range(1000)]) == 1000
    print("captured", "collected" if gc.isenabled() and dropped() is None else "kept")


@pytest.mark.gpu
def test_a_fork_leaves_the_parent_as_it_was():
    assert _in_a_process(_forks).split() == ["refused", "ran", "done"]


def _forks() -> None:
    """The child gets an error that says why, or works with NumPy arrays."""
    import cupy

    layer, made, out = _layer(0), _host_layer(0), on.put(poisoned(D_MODEL, "bfloat16"))
    ffn = psc.SparseFFN(*layer.ws, T)
    ffn(layer.x, out=out)
    cupy.cuda.Device().synchronize()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            for call in (partial(ffn, layer.x, out=out), partial(psc.sparse_ffn, *layer.call, out=out)):
                try:
                    call()
                except psc.NoGPUError as error:
                    said = "refused" if "forked" in str(error) else str(error)
            y = psc.sparse_ffn(*made, T)
            same = np.array_equal(bits(y), bits(reference.sparse_ffn(*made, T)))
            os.write(writing, f"{said}\n{'ran' if same else 'wrong'}\n".encode())
        finally:
            os._exit(0)
    os.close(writing)
    if not select.select([reading], [], [], 60)[0]:
        os.kill(child, 9)
        print("the child hangs")
    print(os.read(reading, 4096).decode())
    os.waitpid(child, 0)
    for _ in range(100):
        out.fill(float("nan"))
        ffn(layer.x, out=out)
        _assert_same(out, layer.expected)
    print("done")


def _digest(started: str = "") -> None:
    """Print a digest of results for several shapes and dtypes; told to, together with another process."""
    cases = [(264, 101, "bfloat16"), (512, 3000, "float16"), (520, 777, "float32")]
    arrays = [[on.put(a) for a in _host_layer(7, *case)] for case in cases]
    if started:
        Path(f"{started}.{os.getpid()}").touch()
        deadline = time.monotonic() + 60
        while not Path(started).exists():
            assert time.monotonic() < deadline
            time.sleep(0.001)
    digest = hashlib.sha256()
    for (d_model, d_ff, dtype), (x, *ws) in zip(cases, arrays, strict=True):
        y = psc.sparse_ffn(x, *ws, T)
        _right(y, _host_layer(7, d_model, d_ff, dtype), on)
        digest.update(on.get(y).tobytes())
    print(digest.hexdigest())


def _cubins(folder: Path) -> list[Path]:
    """The kernels in a cache, all of which are whole: CuPy writes a digest before the code."""
    files = sorted(folder.glob("*.cubin"))
    for file in files:
        data = file.read_bytes()
        assert data[:40].decode() == hashlib.sha1(data[40:]).hexdigest(), f"{file} is broken"
        assert b"ffn_" in data
    return files


@pytest.mark.gpu
def test_two_processes_fill_one_cache(tmp_path):
    cache, started = tmp_path / "cache", tmp_path / "started"
    processes = [_started(_digest, str(started), CUPY_CACHE_DIR=str(cache)) for _ in range(2)]
    deadline = time.monotonic() + 60
    while len([*tmp_path.glob("started.*")]) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    started.touch()
    outs = []
    for process in processes:
        try:
            out, errors = process.communicate(timeout=120)
        finally:
            process.kill()
        assert process.returncode == 0, errors[-3000:]
        outs.append(out)
    assert outs[0] == outs[1] and len(_cubins(cache)) == 6
    assert _in_a_process(_digest, CUPY_CACHE_DIR=str(cache)) == outs[0]


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _foreign(file: Path) -> None:
    file.write_bytes(b"\x7fELF, but not of a kernel. " * 100)


@pytest.mark.gpu
@pytest.mark.parametrize("damage", [_cut, _empty, _foreign])
def test_broken_files_in_the_cache_are_compiled_anew(damage, tmp_path):
    first = _in_a_process(_digest, CUPY_CACHE_DIR=str(tmp_path))
    files = _cubins(tmp_path)
    assert len(files) == 6
    for file in files:
        damage(file)
    assert _in_a_process(_digest, CUPY_CACHE_DIR=str(tmp_path)) == first
    assert _cubins(tmp_path) == files


@pytest.mark.gpu
def test_a_folder_in_the_place_of_a_file_in_the_cache(tmp_path):
    first = _in_a_process(_digest, CUPY_CACHE_DIR=str(tmp_path))
    for file in _cubins(tmp_path):
        file.unlink()
        file.mkdir()
    assert _in_a_process(_digest, CUPY_CACHE_DIR=str(tmp_path)) == first


@pytest.mark.gpu
def test_another_kernel_under_a_kernels_name_in_the_cache_is_an_error(tmp_path):
    _in_a_process(_refused_or_digest, CUPY_CACHE_DIR=str(tmp_path))
    one, other = _cubins(tmp_path)
    swapped = one.read_bytes(), other.read_bytes()
    other.write_bytes(swapped[0])
    one.write_bytes(swapped[1])
    assert _in_a_process(_refused_or_digest, CUPY_CACHE_DIR=str(tmp_path)).startswith("refused ffn_")


def _refused_or_digest() -> None:
    made = _host_layer(7)
    try:
        print(hashlib.sha256(on.get(psc.sparse_ffn(*map(on.put, made), T)).tobytes()).hexdigest())
    except psc.KernelCompileError as error:
        print("refused", error)


@pytest.mark.gpu
@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_a_hundred_streams(library, torch):
    """More than have scratch of their own, all at the same time."""
    import cupy

    mine = to if library == "torch" else on
    layer = _layer(0, library=mine)
    ffn = psc.SparseFFN(*layer.ws, T)
    xs = [mine.put(token(D_MODEL, "bfloat16", np.random.default_rng(seed))) for seed in range(8)]
    expected = [mine.get(ffn(x)) for x in xs]
    assert len({e.tobytes() for e in expected}) == 8
    outs = mine.put(poisoned((500, D_MODEL), "bfloat16"))
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(100)]
    cupy.cuda.Device().synchronize()
    for i in range(500):
        stream = streams[i % 100]
        with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)) if library == "torch" else stream:
            ffn(xs[i % 8], out=outs[i])
    cupy.cuda.Device().synchronize()
    for i, found in enumerate(mine.get(outs)):
        np.testing.assert_array_equal(bits(found), bits(expected[i % 8]))


def _host_bytes() -> int:
    """Memory of this process that is resident."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["cupy", "torch", "module", "new streams"])
def test_twenty_thousand_calls_without_growth(how, torch, monkeypatch):
    """Of what the process has: the GPU's memory is others' too, so what is asked of the driver is counted."""
    import cupy

    layer = _layer(0, d_ff=1000, library=on if how in ("cupy", "new streams") else to)
    ffn, out = psc.SparseFFN(*layer.ws, T), on.put(poisoned(D_MODEL, "bfloat16"))
    mlp = _module_of(layer.x, layer.ws) if how == "module" else None

    def calls(number: int) -> None:
        for i in range(number // 10):
            with cupy.cuda.Stream(non_blocking=True) if how == "new streams" else contextlib.nullcontext():
                for _ in range(10):
                    if how == "module":
                        mlp(layer.x)
                    elif how == "new streams":
                        ffn(layer.x, out=out)
                    else:
                        psc.sparse_ffn(*layer.call)
            if i % 20 == 0:
                cupy.cuda.Device().synchronize()
        cupy.cuda.Device().synchronize()

    def on_the_gpu() -> tuple[int, int]:
        return cupy.get_default_memory_pool().total_bytes(), torch.cuda.memory_reserved()

    calls(5000)
    if how == "new streams":  # as many calls in flight as between two waits: how many are later is a matter of chance
        with cupy.cuda.Stream(non_blocking=True) as busy, torch.cuda.stream(torch.cuda.ExternalStream(busy.ptr)):
            torch.cuda._sleep(500_000_000)
            last = busy.record()
        for _ in range(20):
            with cupy.cuda.Stream(non_blocking=True) as stream:
                stream.wait_event(last)
                for _ in range(10):
                    ffn(layer.x, out=out)
        assert not last.done
        cupy.cuda.Device().synchronize()
    asked, real = [], cupy.cuda.runtime.malloc
    monkeypatch.setattr(cupy.cuda.runtime, "malloc", lambda nbytes: asked.append(nbytes) or real(nbytes))
    before, host = on_the_gpu(), _host_bytes()
    calls(20_000)
    grown = _host_bytes() - host
    # Scratch that is back may be missed where the streams of the eight that have been back for longest are late.
    assert on_the_gpu() == before and len(asked) <= (8 if how == "new streams" else 0)
    assert grown < 4 << 20, f"{grown / 20_000:.0f} bytes a call"


# On two GPUs


@pytest.fixture
def second(torch) -> int:
    """The number of another GPU than the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    return 1


def _on_gpu(library: Any, device: int, arrays: tuple[np.ndarray, ...]) -> list:
    import cupy

    with cupy.cuda.Device(device):
        if library is to:
            import torch

            with torch.cuda.device(device):
                return [to.put(a) for a in arrays]
        return [on.put(a) for a in arrays]


def _every_operator(x, w_gate, w_up, w_down_t) -> list:
    g = psc.ffn_1(x, w_gate)
    x1 = psc.ffn_23(g, x, w_up, T)
    packed = [psc.compress(w) for w in (w_gate, w_up, w_down_t)]
    return [
        *(g, x1, psc.ffn_4(x1, w_down_t), psc.ffn_123(x, w_gate, w_up, T), psc.ffn_12(x, w_up, T), psc.pack_down(w_up)),
        *(psc.sparse_ffn(x, w_gate, w_up, w_down_t, T), psc.SparseFFN(w_gate, w_up, w_down_t, T)(x)),
        *(psc.SparseFFN(*packed, T)(x), packed[0].decompress()),
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("library", [on, to], ids=["cupy", "torch"])
def test_arrays_on_the_gpu_that_is_not_current(library, second):
    """Results lie beside their inputs, with the bits of the current GPU, which stays current."""
    import cupy

    made = _host_layer(0)
    expected = [library.get(a) for a in _every_operator(*_on_gpu(library, 0, made))]
    arrays = _on_gpu(library, second, made)
    cupy.cuda.Device(second).synchronize()
    results = _every_operator(*arrays)
    out = _on_gpu(library, second, (poisoned(D_MODEL, "bfloat16"),))[0]
    assert psc.sparse_ffn(*arrays, T, out=out) is out
    assert cupy.cuda.runtime.getDevice() == 0
    cupy.cuda.Device(second).synchronize()
    with cupy.cuda.Device(second):
        for found, right in zip([*results, out], [*expected, expected[6]], strict=True):
            assert (found.get_device() if library is to else found.device.id) == second
            _assert_same(found, right, library)
    with pytest.raises(ValueError, match="GPU"):
        psc.sparse_ffn(_on_gpu(library, 0, made)[0], *arrays[1:], T)


@pytest.mark.gpu
def test_a_graph_on_the_second_gpu(second):
    import cupy

    expected = _layer(0).expected
    x, *ws = _on_gpu(on, second, _host_layer(0))
    (out,) = _on_gpu(on, second, (poisoned(D_MODEL, "bfloat16"),))
    ffn = psc.SparseFFN(*ws, T)
    with cupy.cuda.Device(second):
        ffn(x, out=out)
        stream = cupy.cuda.Stream(non_blocking=True)
        cupy.cuda.Device().synchronize()
        with stream:
            stream.begin_capture()
            ffn(x, out=out)
            graph = stream.end_capture()
            out.fill(float("nan"))
            graph.launch(stream)
            stream.synchronize()
        _assert_same(out, expected)


@pytest.mark.gpu
def test_two_models_on_two_gpus_in_two_threads(second, torch):
    """Neither thread ever makes its GPU the current one."""
    outs: dict[int, list] = {0: [], second: []}
    works, expected = [], {}
    for device in outs:
        x, *ws = _on_gpu(to, device, _host_layer(device))
        expected[device] = _layer(device).expected

        ffn, mlp = psc.SparseFFN(*ws, T), _module_of(x, ws)

        def work(device=device, x=x, ffn=ffn, mlp=mlp) -> None:
            for _ in range(300):
                outs[device] += [ffn(x), mlp(x)]
            torch.cuda.synchronize(device)

        works.append(work)
    assert expected[0].tobytes() != expected[second].tobytes()
    torch.cuda.synchronize(0)
    torch.cuda.synchronize(second)
    _in_threads(works)
    for device, mine in outs.items():
        assert len(mine) == 600 and all(y.get_device() == device for y in mine)
        found = torch.stack(mine).cpu()
        for y in found:
            _assert_same(y, expected[device], to)
