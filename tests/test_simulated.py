"""The operators from their arguments to their results, on simulated GPUs: what can go wrong behind a launch."""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from checks import (
    DTYPES,
    assert_rounded_sum,
    bits,
    exact_ffn_1,
    exact_ffn_4,
    exact_ffn_12,
    exact_ffn_23,
    gate,
    norm_weight,
    poisoned,
    terms_of_ffn_4,
    token,
    weights,
)
from simulated import Cuda, simulated

import prosparse_cupy as psc
from prosparse_cupy import reference

D_MODEL, D_FF = 40, 70  # as other tests have it, which share what is built
THRESHOLD = 0.25


@pytest.fixture
def gpu(host) -> Iterator[Cuda]:
    with simulated(host, gpus=2) as cuda:
        yield cuda


class Layer:
    """An FFN's arrays, on the host and on the GPU that is current."""

    def __init__(self, gpu: Cuda, dtype: str = "bfloat16", d_model: int = D_MODEL, d_ff: int = D_FF, seed: int = 0) -> None:
        rng = np.random.default_rng([seed, d_model, d_ff])
        self.dtype, self.d_model, self.d_ff, self.rng, self._gpu = dtype, d_model, d_ff, rng, gpu
        self.host = {name: weights(d_ff, d_model, dtype, seed + i) for i, name in enumerate(("w_gate", "w_up", "w_down_t"))}
        self.host |= {name: token(d_ff, dtype, rng) for name in ("gate_bias", "up_bias")}
        self.host |= {"down_bias": token(d_model, dtype, rng), "norm_weight": norm_weight(d_ff, dtype, rng)}
        self.on = {name: gpu.module.asarray(array) for name, array in self.host.items()}

    def put(self, array: np.ndarray) -> Any:
        return self._gpu.module.asarray(array)

    def x(self, tokens: int | None = None) -> np.ndarray:
        size = self.d_model * (tokens or 1)
        x = token(size, self.dtype, self.rng)
        return x if tokens is None else x.reshape(tokens, -1)

    @property
    def w(self) -> tuple[Any, Any, Any]:
        return self.on["w_gate"], self.on["w_up"], self.on["w_down_t"]


def _rows(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1, array.shape[-1])


def _assert_sums(out: np.ndarray, exact: list[tuple[np.ndarray, np.ndarray]], terms: int) -> None:
    for row, (total, magnitude) in zip(_rows(out), exact, strict=True):
        assert_rounded_sum(row, total, magnitude, terms)


# Each combination is a kernel to be built, so dtypes and numbers of tokens are not all combined.
SOME = pytest.mark.parametrize(("dtype", "tokens"), [("bfloat16", None), ("float16", 3), ("float32", 8)])
TOKENS = pytest.mark.parametrize("tokens", [None, 3])
BIASED = pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
EVERY = pytest.mark.parametrize("dtype", DTYPES)
BOTH = pytest.mark.parametrize("specialize", [True, False], ids=["specialised", "dynamic"])


def _some(layer: Layer, biased: bool, **names: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Optional arguments by the layer's names of them, on the host and on the GPU."""
    if not biased:
        return {}, {}
    return {k: layer.host[v] for k, v in names.items()}, {k: layer.on[v] for k, v in names.items()}


@BIASED
@SOME
def test_ffn_1(gpu, dtype, tokens, biased):
    layer = Layer(gpu, dtype)
    x, (on_host, on) = layer.x(tokens), _some(layer, biased, bias="gate_bias")
    found = psc.ffn_1(layer.put(x), layer.on["w_gate"], **on).get()
    assert found.shape == (*x.shape[:-1], D_FF)
    _assert_sums(found, [exact_ffn_1(t, layer.host["w_gate"], *on_host.values()) for t in _rows(x)], D_MODEL + 1)


@BIASED
@TOKENS
@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_ffn_12(gpu, activation, tokens, biased):
    layer = Layer(gpu)
    x, (on_host, on) = layer.x(tokens), _some(layer, biased, bias="up_bias")
    found = psc.ffn_12(layer.put(x), layer.on["w_up"], THRESHOLD, activation=activation, **on).get()
    sums = psc.ffn_1(layer.put(x), layer.on["w_up"], **on).get()
    for row, g, t in zip(_rows(found), _rows(sums), _rows(x), strict=True):
        exact = exact_ffn_12(g, t, layer.host["w_up"], THRESHOLD, activation, *on_host.values())
        np.testing.assert_array_equal(bits(row), bits(exact))


@BIASED
@TOKENS
@pytest.mark.parametrize("activation", ["relu", "relu2", "drelu"])
def test_ffn_23_and_ffn_123(gpu, activation, tokens, biased):
    layer = Layer(gpu)
    x, (on_host, on) = layer.x(tokens), _some(layer, biased, bias="up_bias")
    g = np.stack([gate(D_FF, layer.dtype, 0.6, layer.rng, THRESHOLD) for _ in range(tokens or 1)]).reshape(*x.shape[:-1], -1)
    found = psc.ffn_23(layer.put(g), layer.put(x), layer.on["w_up"], THRESHOLD, activation=activation, **on).get()
    each = zip(_rows(g), _rows(x), strict=True)
    up_bias = on_host.get("bias")
    exact = [exact_ffn_23(*one, layer.host["w_up"], THRESHOLD, activation, up_bias) for one in each]
    _assert_sums(found, exact, D_MODEL + 2)
    assert not bits(found[~reference.active(g, THRESHOLD)]).any(), "an inactive output is not +0"
    _, gate_bias = _some(layer, biased, bias="gate_bias")
    _, both = _some(layer, biased, gate_bias="gate_bias", up_bias="up_bias")
    own = psc.ffn_1(layer.put(x), layer.on["w_gate"], **gate_bias)
    of_two = psc.ffn_23(own, layer.put(x), layer.on["w_up"], THRESHOLD, activation=activation, **on)
    of_one = psc.ffn_123(layer.put(x), layer.on["w_gate"], layer.on["w_up"], THRESHOLD, activation=activation, **both)
    np.testing.assert_array_equal(bits(of_one.get()), bits(of_two.get()))


@pytest.mark.parametrize(("biased", "normed"), [(False, False), (True, False), (False, True)])
@TOKENS
def test_ffn_4(gpu, tokens, biased, normed):
    layer = Layer(gpu)
    x1 = np.stack([gate(D_FF, layer.dtype, 0.6, layer.rng) for _ in range(tokens or 1)])
    x1 = x1[0] if tokens is None else x1
    on_host, on = _some(layer, biased, bias="down_bias")
    if normed:
        on |= {"norm_weight": layer.on["norm_weight"], "norm_eps": 0.5}
        on_host |= {"norm_weight": layer.host["norm_weight"], "norm_eps": 0.5}
    found = psc.ffn_4(layer.put(x1), layer.on["w_down_t"], **on).get()
    exact = [exact_ffn_4(t, layer.host["w_down_t"], **on_host) for t in _rows(x1)]
    _assert_sums(found, exact, terms_of_ffn_4(D_FF, normed=normed))


@BOTH
@SOME
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_a_whole_ffn_is_its_halves(gpu, gated, dtype, tokens, specialize):
    """To the bit, with all that it may have; the halves have tests of their own."""
    layer = Layer(gpu, dtype)
    w, x, how = layer.w, layer.put(layer.x(tokens)), {"specialize": specialize}
    end = {"norm_weight": layer.on["norm_weight"], "norm_eps": 0.5}
    biases = {name: layer.on[name] for name in ("gate_bias", "up_bias", "down_bias")[not gated :]}
    if gated:
        x1 = psc.ffn_123(x, *w[:2], THRESHOLD, gate_bias=biases["gate_bias"], up_bias=biases["up_bias"])
    else:
        x1 = psc.ffn_12(x, w[1], THRESHOLD, activation="relu2", bias=biases["up_bias"])
    y = psc.ffn_4(x1, w[2], bias=biases["down_bias"], **end).get()
    assert np.isfinite(y.astype(np.float32)).all() and y.any()
    arrays = (w[0] if gated else None, *w[1:])
    activation = "relu" if gated else "relu2"
    whole = psc.sparse_ffn(x, *arrays, THRESHOLD, activation=activation, **biases, **end, **how)
    bound = psc.SparseFFN(*arrays, THRESHOLD, activation=activation, **biases, **end, **how)
    out = layer.put(poisoned(y.shape, dtype))
    assert bound(x, out=out) is out
    for found in (whole, bound(x), out):
        np.testing.assert_array_equal(bits(found.get()), bits(y))


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_a_first_half_lets_its_successor_in_where_that_is_ffn_4(gpu, gated):
    """By itself, and before anything else, it does not: others may write before they wait, into what is still read."""
    layer = Layer(gpu)
    w_gate, w_up, w_down_t = layer.w
    for tokens, how in ((None, {}), (3, {}), (5, {"batch_invariant": False})):
        x = layer.put(layer.x(tokens))
        psc.sparse_ffn(x, w_gate if gated else None, w_up, w_down_t, **how)
        psc.ffn_123(x, w_gate, w_up) if gated else psc.ffn_12(x, w_up)
        half, then, alone = gpu.launches[-3:]
        assert half.kernel == alone.kernel == ("ffn_123" if gated else "ffn_12") and then.kernel.startswith("ffn_4")
        assert half.overlaps and then.overlaps and alone.overlaps
        assert "EARLY_SUCCESSOR" in half.defines and "EARLY_SUCCESSOR" not in alone.defines
        assert half.defines.keys() - alone.defines.keys() == {"EARLY_SUCCESSOR"}


def test_a_half_that_is_launched_alike_everywhere_is_compiled_once(gpu):
    """As ffn_12 in 12 bits, which no rule has let a successor in early."""
    layer = Layer(gpu)
    packed = psc.compress(layer.w[1], layout="rows")
    x = layer.put(layer.x())
    psc.sparse_ffn(x, None, packed, layer.w[2])
    loaded = len(gpu._functions)
    psc.ffn_12(x, packed)
    assert len(gpu._functions) == loaded and gpu.launches[-1].kernel == gpu.launches[-3].kernel == "ffn_12"


@TOKENS
def test_compressed_weights_have_the_bits_of_plain_ones(gpu, tokens):
    layer = Layer(gpu)
    x = layer.put(layer.x(tokens))
    kinds = ("rows", "rows", "slices")
    packed = [psc.compress(w, layout=kind) for w, kind in zip(layer.w, kinds, strict=True)]
    for w, c in zip(layer.w, packed, strict=True):
        np.testing.assert_array_equal(bits(c.decompress().get()), bits(w.get()))
    y = psc.sparse_ffn(x, *layer.w, THRESHOLD).get()
    for arrays in itertools.product(*zip(layer.w, packed, strict=True)):
        np.testing.assert_array_equal(bits(psc.sparse_ffn(x, *arrays, THRESHOLD).get()), bits(y))
        np.testing.assert_array_equal(bits(psc.SparseFFN(*arrays, THRESHOLD)(x).get()), bits(y))


def test_sums_in_float32(gpu):
    layer = Layer(gpu)
    x = layer.x()
    parts = [layer.put(poisoned(size, "float32")) for size in (D_FF, D_MODEL, D_MODEL)]
    assert psc.ffn_1(layer.put(x), layer.on["w_gate"], out=parts[0]) is parts[0]
    assert_rounded_sum(parts[0].get(), *exact_ffn_1(x, layer.host["w_gate"]), D_MODEL)
    x1 = psc.ffn_123(layer.put(x), *layer.w[:2], THRESHOLD)
    psc.ffn_4(x1, layer.on["w_down_t"], out=parts[1])
    psc.sparse_ffn(layer.put(x), *layer.w, THRESHOLD, out=parts[2])
    assert_rounded_sum(parts[1].get(), *exact_ffn_4(x1.get(), layer.host["w_down_t"]), D_FF)
    np.testing.assert_array_equal(parts[1].get(), parts[2].get())


@BOTH
@EVERY
def test_pack_down(gpu, dtype, specialize):
    w = weights(D_MODEL, D_FF, dtype)
    found = psc.pack_down(gpu.module.asarray(w), specialize=specialize).get()
    np.testing.assert_array_equal(bits(found), bits(w.T))


def _ffn(gpu: Cuda, **layer: Any) -> tuple[Layer, psc.SparseFFN]:
    made = Layer(gpu, **layer)
    return made, psc.SparseFFN(*made.w, THRESHOLD)


def _expected(gpu: Cuda, ffn: psc.SparseFFN, tokens: list[Any]) -> list[np.ndarray]:
    found = [ffn(x) for x in tokens]
    gpu.synchronize()
    return [y.get() for y in found]


def _assert_same(found: list[Any], expected: list[np.ndarray]) -> None:
    for y, right in zip(found, expected, strict=True):
        np.testing.assert_array_equal(bits(y.get()), bits(right))


def test_launches_are_on_the_callers_stream(gpu):
    layer, ffn = _ffn(gpu)
    x = layer.put(layer.x())
    own, other = gpu.module.cuda.Stream(non_blocking=True), gpu.module.cuda.Stream()
    w_down = layer.put(weights(D_MODEL, 104, layer.dtype))
    calls = [
        lambda: ffn(x),
        lambda: psc.sparse_ffn(x, *layer.w),
        lambda: psc.ffn_1(x, layer.w[0]),
        lambda: psc.pack_down(w_down),
        lambda: psc.compress(layer.w[0]).decompress(),
    ]
    for call in calls:
        for stream in (own, other, gpu.module.cuda.Stream.null):
            gpu.launches.clear()
            with stream:
                call()
            assert {launch.stream for launch in gpu.launches} == {gpu.stream(stream.ptr).ident}
    gpu.launches.clear()
    for stream in (own, other):
        with stream:
            ffn(x)
    assert not any(launch.overlaps for launch in gpu.launches), "programmatic on streams that may be destroyed"
    ffn(x)
    assert all(launch.overlaps for launch in gpu.launches[-2:])


def test_launches_are_on_the_arrays_gpu(gpu):
    with gpu.module.cuda.Device(1):
        there, ffn = _ffn(gpu)
        x = there.x()
        given = there.put(x)
        expected = psc.ffn_4(psc.ffn_123(given, *there.w[:2], THRESHOLD), there.w[2]).get()
    here, ffn_here = _ffn(gpu, seed=5)
    before = len(gpu.launches)
    y, found = ffn(given), psc.ffn_1(given, there.w[0])
    assert {launch.device for launch in gpu.launches[before:]} == {1} and y.device.id == found.device.id == 1
    assert gpu.module.cuda.runtime.getDevice() == 0
    with gpu.module.cuda.Device(1):
        _assert_same([y], [expected])
    with pytest.raises(ValueError, match="GPU"):
        ffn_here(given)
    with pytest.raises(ValueError, match="GPU"):
        psc.ffn_1(given, here.w[0])


def test_the_stream_is_the_current_one_of_the_arrays_gpu(gpu):
    with gpu.module.cuda.Device(1):
        layer, ffn = _ffn(gpu)
        x, stream = layer.put(layer.x()), gpu.module.cuda.Stream(non_blocking=True)
        before = len(gpu.launches)
        with stream, gpu.module.cuda.Device(0), gpu.module.cuda.Stream(non_blocking=True):
            ffn(x)
    assert {launch.stream for launch in gpu.launches[before:]} == {gpu.stream(stream.ptr).ident}


@pytest.mark.parametrize("seed", range(2))
def test_streams_do_not_disturb_each_other(host, seed):
    """Other values, dims, dtypes and numbers of tokens at once, each on a stream of its own."""
    with simulated(host, seed=seed) as gpu:
        layers = [_ffn(gpu), _ffn(gpu, dtype="float32"), _ffn(gpu, d_ff=700)]
        work = [(ffn, layer.put(layer.x(tokens))) for layer, ffn in layers for tokens in (None, 3) for _ in range(2)]
        expected = [_expected(gpu, ffn, [x])[0] for ffn, x in work]
        streams = [gpu.module.cuda.Stream(non_blocking=True) for _ in work[::2]]
        found = []
        for (ffn, x), stream in zip(work, itertools.cycle(streams)):
            with stream:
                found.append(ffn(x))
        gpu.synchronize()
        _assert_same(found, expected)
        assert len(gpu.launches) == 4 * len(work)


@pytest.mark.parametrize("streams", ["one", "own", "destroyed"])
def test_threads_do_not_disturb_each_other(gpu, streams):
    layer, ffn = _ffn(gpu, dtype="float32", d_ff=700)
    tokens = [layer.put(layer.x()) for _ in range(12)]
    expected = _expected(gpu, ffn, tokens)
    found: list[Any] = [None] * len(tokens)
    failed: list[BaseException] = []

    def new_stream() -> Any:
        return contextlib.nullcontext() if streams == "one" else gpu.module.cuda.Stream(non_blocking=True)

    def run(numbers: range) -> None:
        stream = new_stream()
        try:
            for i in numbers:
                with stream:
                    found[i] = ffn(tokens[i])
                if streams == "destroyed":
                    del stream
                    stream = new_stream()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(range(i, len(tokens), 4),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    gpu.synchronize()
    _assert_same(found, expected)


@pytest.mark.parametrize("streams", ["one", "own"])
def test_threads_that_launch_at_the_same_moment(gpu, streams):
    """Each has packed its arguments and taken its scratch before the driver looks at any of them."""
    layer, ffn = _ffn(gpu)
    tokens = [layer.put(layer.x()) for _ in range(2)]
    expected = _expected(gpu, ffn, tokens)
    gpu.before_launch = threading.Barrier(len(tokens), timeout=60).wait
    found: list[Any] = [None] * len(tokens)

    def run(i: int) -> None:
        with contextlib.nullcontext() if streams == "one" else gpu.module.cuda.Stream(non_blocking=True):
            found[i] = ffn(tokens[i])

    for _ in range(2):  # also with scratch that was used before
        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(tokens))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        gpu.synchronize()
        _assert_same(found, expected)


def test_streams_without_scratch_of_their_own_on_two_gpus(gpu):
    """A call gets scratch of its own GPU, once what used it before has ended."""
    layers = []
    for device in (0, 1):
        with gpu.module.cuda.Device(device):
            layer, ffn = _ffn(gpu, seed=device)
            x = layer.put(layer.x())
            layers.append((device, ffn, x, _expected(gpu, ffn, [x])[0]))
    for _ in range(2):
        found = []
        for device, ffn, x, expected in layers:
            with gpu.module.cuda.Device(device):
                for stream in [gpu.module.cuda.Stream(non_blocking=True) for _ in range(70)]:
                    with stream:
                        found.append((ffn(x), expected))
        gpu.synchronize()
        _assert_same(*zip(*found, strict=True))


def test_more_shared_memory_than_a_block_has_unasked(gpu):
    layer = Layer(gpu, d_model=16, d_ff=12_000)
    x1 = np.zeros((4, layer.d_ff), DTYPES[layer.dtype])
    x1[:, [0, 5_000, 11_999]] = token(12, layer.dtype, layer.rng).reshape(4, 3)
    found = psc.ffn_4(layer.put(x1), layer.on["w_down_t"]).get()
    assert gpu.launches[-1].shared_bytes > 48 * 1024
    _assert_sums(found, [exact_ffn_4(t, layer.host["w_down_t"]) for t in x1], 4)


def test_bound_weights_that_have_moved_to_another_gpu_are_refused(gpu):
    """As torch moves a module's weights: the arrays are the same objects."""
    layer, ffn = _ffn(gpu)
    with gpu.module.cuda.Device(1):
        there, x = Layer(gpu), layer.put(layer.x())
    for array, other in zip(layer.w, there.w, strict=True):
        array._array, array._memory = other._array, other._memory
    with pytest.raises(ValueError, match="its weights have changed since it was built"):
        ffn(x)


def test_two_calls_on_two_streams_while_one_stands_still(gpu):
    """Their scratch is not the same memory, whatever the dims, and on one stream it is."""
    used = {}
    for d_ff in (101, 700):
        layer, ffn = _ffn(gpu, d_ff=d_ff)
        x = layer.put(layer.x())
        for stream in (gpu.module.cuda.Stream.null, gpu.module.cuda.Stream(), gpu.module.cuda.Stream()):
            with stream:
                ffn(x), ffn(x)
            first = [launch for launch in gpu.launches if launch.kernel == "ffn_123"][-2:]
            second = [launch for launch in gpu.launches if launch.kernel == "ffn_4"][-2:]
            scratch = {launch.arguments[3] for launch in first} | {launch.arguments[0] for launch in second}
            assert len(scratch) == 1
            used[d_ff, stream.ptr] = scratch.pop()
    on_streams = [{address for (_, s), address in used.items() if s == stream} for _, stream in used]
    assert all(a == b or not a & b for a in on_streams for b in on_streams)


def test_scratch_is_as_large_as_the_tokens_need(gpu):
    """The sanitizers see what is written behind it."""
    layer, ffn = _ffn(gpu, dtype="float32", d_ff=1100)
    for tokens in (None, 3):
        x = layer.x(tokens)
        y = ffn(layer.put(x)).get()
        assert gpu.allocated[-1].nbytes >= 4 * 1100 * (tokens or 1)
        one = [ffn(layer.put(row)).get() for row in _rows(x)]
        np.testing.assert_array_equal(bits(y), bits(np.stack(one).reshape(y.shape)))


def test_calls_do_not_grow(gpu):
    layer, ffn = _ffn(gpu)
    x, out = layer.put(layer.x()), layer.put(poisoned(D_MODEL, layer.dtype))
    for _ in range(3):
        ffn(x, out=out)
    gc.collect()
    before = len(gpu._memory)
    for _ in range(20):
        ffn(x, out=out)
        psc.ffn_1(x, layer.w[0])
    gpu.synchronize()
    gc.collect()
    assert len(gpu.allocated) == 1 and len(gpu._memory) <= before + 1


def test_graphs_keep_their_scratch(gpu):
    layer, ffn = _ffn(gpu)
    other_layer, other = _ffn(gpu, seed=7)
    tokens = [layer.put(layer.x()) for _ in range(4)]
    expected = _expected(gpu, ffn, tokens)
    stream = gpu.module.cuda.Stream(non_blocking=True)
    graphs = []
    for x in tokens:
        with stream:
            stream.begin_capture(0)
            y = ffn(x)
            graphs.append((stream.end_capture(), y))
    assert not any(work.done is False for work in gpu.waiting), "a capture ran something"
    streams = [gpu.module.cuda.Stream(non_blocking=True) for _ in graphs]
    for _ in range(3):
        for (graph, _), where in zip(graphs, streams, strict=True):
            graph.launch(where)
            with where:
                other(other_layer.put(other_layer.x()))
    gpu.synchronize()
    _assert_same([y for _, y in graphs], expected)
    allocated = len(gpu.allocated)
    del graphs, graph
    gc.collect()
    gpu.synchronize()
    with stream:
        stream.begin_capture(0)
        y = ffn(tokens[0])
        again = stream.end_capture()
    assert len(gpu.allocated) == allocated, "the scratch of graphs that are gone is not used again"
    again.launch(stream)
    gpu.synchronize()
    _assert_same([y], expected[:1])


def test_a_destroyed_graphs_scratch_waits_for_its_launches(gpu):
    layer, ffn = _ffn(gpu)
    x, other = layer.put(layer.x()), layer.put(layer.x())
    right, expected = _expected(gpu, ffn, [x, other])
    stream, second = (gpu.module.cuda.Stream(non_blocking=True) for _ in range(2))

    def captured(token: Any) -> tuple[Any, Any]:
        with stream:
            stream.begin_capture()
            y = ffn(token)
            return stream.end_capture(), y

    graph, y = captured(x)
    graph.launch(stream)
    del graph
    gc.collect()
    graph, z = captured(other)  # while the first one's launch is still to run
    graph.launch(second)
    gpu.synchronize()
    _assert_same([y, z], [right, expected])


def test_another_thread_may_capture_meanwhile(gpu):
    """In CUDA's global mode nobody may allocate or ask for an event, unless a thread says that it means it."""
    layer, ffn = _ffn(gpu)
    x = layer.put(layer.x())
    expected = _expected(gpu, ffn, [x])
    assert gpu.thread.capture_mode == 0, "the thread's own captures would not be warned any more"
    stream = gpu.module.cuda.Stream(non_blocking=True)
    stream.begin_capture(0)
    found = []
    for where in [gpu.module.cuda.Stream(non_blocking=True) for _ in range(70)]:
        with where:
            found.append(ffn(x))
    stream.end_capture()
    gpu.synchronize()
    _assert_same(found, 70 * expected)


@pytest.mark.parametrize("what", ["malloc", "empty"])
def test_out_of_memory_and_then_not(gpu, what):
    layer, ffn = _ffn(gpu)
    x = layer.put(layer.x())
    gpu.fails[what] = 2
    error = MemoryError if what == "malloc" else gpu.module.cuda.runtime.CUDARuntimeError
    with pytest.raises(error):
        ffn(x)
    assert not gpu.launches
    gpu.fails.clear()
    y = ffn(x).get()
    np.testing.assert_array_equal(bits(y), bits(ffn(x).get()))
    assert np.isfinite(y.astype(np.float32)).all()


def test_an_older_gpu_gives_the_same_bits(host):
    found = []
    for capability in (90, 80):
        with simulated(host, capability=capability) as gpu:
            layer, ffn = _ffn(gpu)
            layer.rng = np.random.default_rng(3)
            found.append(ffn(layer.put(layer.x())).get())
            assert all(launch.overlaps == (capability == 90) for launch in gpu.launches)
    np.testing.assert_array_equal(bits(found[0]), bits(found[1]))


def test_warmup_compiles_what_calls_need(gpu):
    layer = Layer(gpu)
    report = psc.warmup(D_MODEL, D_FF, tokens=(1, 3))
    loaded = len(gpu._functions)
    assert loaded == len(report)
    for tokens in (None, 3):
        x = layer.put(layer.x(tokens))
        psc.sparse_ffn(x, *layer.w), psc.ffn_1(x, layer.w[0])
        psc.ffn_23(psc.ffn_1(x, layer.w[0]), x, layer.w[1])
    psc.pack_down(layer.put(weights(D_MODEL, D_FF, layer.dtype)))
    assert len(gpu._functions) == loaded


def test_what_the_driver_refuses_is_an_error(gpu):
    layer = Layer(gpu)
    gpu._functions.clear()
    psc.ffn_1(layer.put(layer.x()), layer.w[0])
    (function,) = gpu._functions.values()
    function.device = 1
    with pytest.raises(gpu.module.cuda.driver.CUDADriverError, match="400"):
        psc.ffn_1(layer.put(layer.x()), layer.w[0])
