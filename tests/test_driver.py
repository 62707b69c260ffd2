"""Launches through the driver: what is packed, programmatic launches, and the path where the driver has none."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import os
import struct
import sys
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from checks import DTYPES, bits, gate, poisoned, token, weights
from gpu_arrays import OnCupy
from plans import Shape, plan_of
from simulated import simulated

import prosparse_cupy as psc
from prosparse_cupy import compiler, driver, ffn, ops
from prosparse_cupy.problem import Target
from prosparse_cupy.testing import synthetic, timing

PLAN = plan_of("ffn_23", Shape(4096, 11008, "bfloat16"))
ARGUMENTS = (0x7F0000000010, 0x7F0000000020, 0x7F0000000030, 0x7F0000000040, 0.25, 11008, 4096, 0x7F0000000050)
PORTABLE, HOPPER = Target(80, 132), Target(90, 132)


class _FakeDriver:
    """Notes what a launch hands to the driver."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.calls = status, []
        error = type("CUDADriverError", (RuntimeError,), {})
        self.captured: set[int] = set()
        self.current, self.visited = 0, []
        runtime = SimpleNamespace(setDevice=lambda index: None, getDevice=lambda: self.current)
        driver = SimpleNamespace(launchKernel=self.launch_kernel, CUDADriverError=error)
        self.cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime, driver=driver, Device=self.device))

    @contextlib.contextmanager
    def device(self, index: int) -> Iterator[None]:
        before, self.current = self.current, index
        self.visited.append(index)
        yield
        self.current = before

    def _arguments(self, pointers: int) -> tuple:
        slots = (ctypes.c_void_p * len(ARGUMENTS)).from_address(pointers)
        kinds = {"P": ctypes.c_uint64, "f": ctypes.c_float, "i": ctypes.c_int}
        return tuple(kinds[a].from_address(s).value for a, s in zip(PLAN.arguments, slots, strict=True))

    def launch_kernel_ex(self, config: int, function: int, pointers: int, extra: None) -> int:
        *shape, stream, attribute, count = struct.unpack("7I4xQQI4x", ctypes.string_at(config, 56))
        attributes = ctypes.string_at(attribute, 72) if count else b""
        self.calls.append((function, tuple(shape), stream, count, attributes, self._arguments(pointers)))
        return self.status

    def launch_kernel(self, function: int, *rest) -> None:
        *shape, stream, pointers, _ = rest
        self.calls.append((function, tuple(shape), stream, 0, b"", self._arguments(pointers)))


@pytest.fixture
def noted(monkeypatch):
    fake = _FakeDriver()
    monkeypatch.setattr(driver, "cupy", lambda: fake.cupy)
    monkeypatch.setattr(driver, "launch_kernel_ex", lambda: fake.launch_kernel_ex)
    monkeypatch.setattr(driver, "is_capturing", lambda: fake.captured.__contains__)
    monkeypatch.setattr(driver, "lasting_streams", {0, 1})
    return fake


def test_a_programmatic_launch_is_packed_as_the_driver_reads_it(noted):
    driver.launcher(0xF00, PLAN, 0)(0x57, True, *ARGUMENTS)
    [(function, shape, stream, count, attribute, arguments)] = noted.calls
    assert (function, shape, stream, count) == (0xF00, (*PLAN.grid, *PLAN.block, 0), 0x57, 1)
    assert struct.unpack("i4xi60x", attribute) == (6, 1)  # PROGRAMMATIC_STREAM_SERIALIZATION, on
    assert arguments == ARGUMENTS


def test_a_weight_of_several_pointers_is_one_argument(noted, monkeypatch):
    """The pointers of a struct lie side by side, and the driver gets one pointer to them."""
    plan = dataclasses.replace(PLAN, arguments=("P", "PPP", "f", "i"))
    found = []

    def note(config: int, function: int, pointers: int, extra: None) -> int:
        slots = (ctypes.c_void_p * 4).from_address(pointers)
        found.append((ctypes.c_uint64.from_address(slots[0]).value, *(ctypes.c_uint64 * 3).from_address(slots[1])))
        found.append((ctypes.c_float.from_address(slots[2]).value, ctypes.c_int.from_address(slots[3]).value))
        return 0

    monkeypatch.setattr(driver, "launch_kernel_ex", lambda: note)
    driver.launcher(0xF00, plan, 0)(0, True, 0x10, 0x20, 0x30, 0x40, 0.5, 7)
    assert found == [(0x10, 0x20, 0x30, 0x40), (0.5, 7)]


def test_streams_that_may_be_destroyed_are_launched_on_plainly(noted):
    """On these the driver lets programmatic launches of two streams wait for each other for ever, see `lasting_streams`."""
    driver.lasting_streams.add(0x77)
    noted.captured.add(0x57)
    expected = {0: True, 1: True, 2: False, 0x57: True, 0x67: False, 0x77: True}
    assert {stream: driver.overlaps(stream) for stream in expected} == expected
    assert {stream: driver.is_captured(stream) for stream in expected} == {s: s == 0x57 for s in expected}
    for stream, overlaps in expected.items():
        assert driver.overlaps(stream, captured=driver.is_captured(stream)) == overlaps
    noted.captured.clear()
    assert not driver.overlaps(0x57)
    launch_on = driver.launcher(0xF00, PLAN, 0)
    for overlaps in (False, True):
        launch_on(0x57, overlaps, *ARGUMENTS)
    assert [(stream, count) for _, _, stream, count, *_ in noted.calls] == [(0x57, 0), (0x57, 1)]


STREAMS = {0: True, 1: True, 2: False, 0x57: True, 0x67: False, 0x77: True}
"""Whether launches on a stream may overlap: of 0x57 because it is captured, of 0x77 because torch keeps it."""


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("programmatic", [True, False])
def test_callers_tell_a_launch_whether_it_may_overlap(noted, monkeypatch, stream, programmatic):
    driver.lasting_streams.add(0x77)
    noted.captured.add(0x57)
    told, taken = [], []
    plan = SimpleNamespace(programmatic=programmatic, partial_bytes=0)
    kernel = SimpleNamespace(plan=plan, launch=lambda s, overlaps, *_: told.append((s, overlaps)))
    checked = SimpleNamespace(d_ff=24, d_model=16, device=0, scratch_bytes=4096, down_pointers=1)
    family = SimpleNamespace(stream=lambda device: stream)
    facts = {"inputs": [1, 2, 3, 4], "output": 5, "extras": {}, "result": lambda: None}
    call = SimpleNamespace(on_host=False, checked=checked, family=family, **facts)
    for module in (ops, ffn):
        monkeypatch.setattr(module, "kernel_of", lambda *_, **__: kernel)
    monkeypatch.setattr(ffn, "take", lambda *arguments: taken.append(arguments) or (9, []))
    ops._launch("ffn_1", call, True)
    assert told == [(stream, programmatic and STREAMS[stream])]
    told.clear()
    ffn._run(call, (1, None, 2, 3), call.inputs, ffn._How(0.0, "relu", 0.0, True), {})
    assert told == 2 * [(stream, STREAMS[stream])] and taken == [(stream, 0, 4096, stream == 0x57)]


@pytest.mark.parametrize("has", [True, False])
def test_launches_are_made_with_the_kernels_gpu_current(noted, monkeypatch, has):
    if not has:
        monkeypatch.setattr(driver, "launch_kernel_ex", lambda: None)
    driver.launcher(0xF00, PLAN, 1)(0x57, False, *ARGUMENTS)
    assert noted.visited == [1] and noted.current == 0 and len(noted.calls) == 1
    driver.launcher(0xF00, PLAN, 0)(0x57, False, *ARGUMENTS)
    assert noted.visited == [1] and len(noted.calls) == 2


@pytest.mark.parametrize("why", ["the plan", "the driver"])
def test_a_launch_without_the_attribute_goes_through_cupy(noted, monkeypatch, why):
    plan = PLAN
    if why == "the plan":
        plan = plan_of("ffn_23", Shape(4096, 11008, "bfloat16", target=PORTABLE))
        monkeypatch.setattr(driver, "launch_kernel_ex", pytest.fail)
    else:
        monkeypatch.setattr(driver, "launch_kernel_ex", lambda: None)
    driver.launcher(0xF00, plan, 0)(0x57, False, *ARGUMENTS)
    assert noted.calls == [(0xF00, (*plan.grid, *plan.block, 0), 0x57, 0, b"", ARGUMENTS)]


def test_the_drivers_refusal_is_an_error(noted):
    noted.status = 701
    with pytest.raises(noted.cupy.cuda.driver.CUDADriverError, match="701"):
        driver.launcher(0xF00, PLAN, 0)(0, True, *ARGUMENTS)


@pytest.mark.parametrize("missing", [OSError, AttributeError])
def test_a_driver_without_the_call_is_no_error(monkeypatch, missing):
    def load(name):
        raise missing(name)

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert driver.launch_kernel_ex.__wrapped__() is None


# On a GPU

on = OnCupy()


def _run(kernel: str, target: Target, arrays: list, scalars: tuple = ()) -> np.ndarray:
    d_ff, d_model = arrays[-2].shape
    plan = plan_of(kernel, Shape(d_model, d_ff, "bfloat16", target=target))
    out = arrays[-1]
    out.view(np.uint8).fill(0xFF)
    compiler.Kernel(plan, 0).launch(
        0, True, *(a.data.ptr for a in arrays), *scalars, d_ff, d_model, *ops.trailing_arguments(kernel, {}, 0.0)
    )
    return on.get(out)


@pytest.mark.gpu
@pytest.mark.parametrize(("d_model", "d_ff"), [(4096, 11008), (264, 101)])
def test_the_path_without_hopper_instructions_gives_the_same_bits(d_model, d_ff):
    rng = np.random.default_rng()
    x, g, w = token(d_model, "bfloat16", rng), gate(d_ff, "bfloat16", 0.9, rng), weights(d_ff, d_model, "bfloat16")
    x, g, w, x1, y = (on.put(a) for a in (x, g, w, poisoned(d_ff, "bfloat16"), poisoned(d_model, "bfloat16")))
    runs = {
        "ffn_1": ([x, w, x1], ()),
        "ffn_123": ([x, w, w, x1], (0.1,)),
        "ffn_23": ([g, x, w, x1], (0.1,)),
        "ffn_4": ([g, w, y], ()),
    }
    for kernel, (arrays, scalars) in runs.items():
        portable, hopper = (_run(kernel, target, arrays, scalars) for target in (PORTABLE, HOPPER))
        assert np.isfinite(portable.astype(np.float32)).all()
        np.testing.assert_array_equal(bits(portable), bits(hopper))


@pytest.mark.gpu
def test_overlapping_launches_see_what_their_predecessors_wrote():
    """A chain of FFNs, each reading what the last one wrote and reusing the scratch, against one that waits every time."""
    import cupy

    d_model, d_ff, layers = 1024, 3000, 48
    rng = np.random.default_rng()
    w = [on.put(synthetic.weights(d_ff, d_model, DTYPES["float32"], rng)) for _ in range(9)]
    ffns = [psc.SparseFFN(*w[i : i + 3]) for i in (0, 3, 6)]
    start = on.put(token(d_model, "float32", rng))
    hidden = [on.put(poisoned(d_model, "float32")) for _ in range(2)]

    def chain(after_call=lambda: None) -> None:
        hidden[0][...] = start
        for layer in range(layers):
            out = ffns[layer % 3](hidden[layer % 2], out=hidden[1 - layer % 2])
            out *= 8  # kernels of another library in between, which also keep the values from dying out or growing
            cupy.clip(out, -1, 1, out=out)
            after_call()

    chain(cupy.cuda.Device().synchronize)
    expected = on.get(hidden[layers % 2])
    assert np.isfinite(expected).all() and 0.1 < np.abs(expected).mean() <= 1
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        chain()
        graph = stream.end_capture()
    for _ in range(20):
        for run in (chain, graph.launch):
            run()
            cupy.cuda.Device().synchronize()
            np.testing.assert_array_equal(bits(on.get(hidden[layers % 2])), bits(expected))


class _Garbage:
    """In a reference cycle from the start."""

    def __init__(self) -> None:
        self.own = self


def _many_objects() -> None:
    """As many as make Python collect, were it allowed to."""
    assert len([[] for _ in range(100 * gc.get_threshold()[0])])


def test_nothing_is_collected_while_a_graph_is_captured():
    gc.collect()
    with driver.without_collections():
        garbage = weakref.ref(_Garbage())
        _many_objects()
        assert garbage() is not None and not gc.isenabled()
    assert gc.isenabled()
    _many_objects()
    assert garbage() is None


@pytest.fixture
def collector() -> Iterator[None]:
    yield
    gc.enable()


def test_who_turned_collections_off_finds_them_off(collector):
    gc.disable()
    with driver.without_collections():
        assert not gc.isenabled()
    assert not gc.isenabled()


def test_collections_wait_for_the_last_capture(collector):
    with pytest.raises(ZeroDivisionError), driver.without_collections():
        with contextlib.ExitStack() as first, driver.without_collections():
            first.enter_context(driver.without_collections())
            first.close()
            assert not gc.isenabled()
        assert not gc.isenabled()
        raise ZeroDivisionError
    assert gc.isenabled()
    gc.disable()
    with driver.without_collections():
        pass
    assert not gc.isenabled(), "what was on before an earlier capture says nothing of this one"


def _interrupted_in(code: Any, nth: int) -> bool:
    """Capture, and be interrupted at the nth line of this code; False where it has fewer."""
    passed = 0

    def stop(frame, event, argument):
        nonlocal passed
        if event == "line":
            passed += 1
            if passed == nth:
                raise KeyboardInterrupt
        return stop

    before = sys.gettrace()
    sys.settrace(lambda frame, event, argument: stop if frame.f_code is code else None)
    try:
        with driver.without_collections():
            pass
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("method", ["hold", "let_go", "restore"])
def test_an_interrupt_does_not_leave_collections_off(method, collector):
    nth = 1
    while _interrupted_in(getattr(driver._Collector, method).__code__, nth):
        assert gc.isenabled() and not driver._collector.holders, f"interrupted at line {nth}"
        nth += 1
    assert nth > 2


def test_a_capture_inside_another_at_any_line(collector):
    """As a signal's handler may make one."""
    inside = 0

    def capture(frame, event, argument):
        nonlocal inside
        if event == "line" and not busy:
            busy.append(True)
            inside += 1
            with driver.without_collections():
                assert not gc.isenabled()
            busy.clear()
        return capture

    busy: list[bool] = []
    codes = [getattr(driver._Collector, name).__code__ for name in ("hold", "let_go", "restore")]
    before = sys.gettrace()
    sys.settrace(lambda frame, event, argument: capture if frame.f_code in codes and not busy else None)
    try:
        with driver.without_collections():
            assert not gc.isenabled()
    finally:
        sys.settrace(before)
    assert gc.isenabled() and inside > 6


def test_the_harness_captures_so(host):
    """What benchmarks time."""
    seen: list[bool] = []
    with simulated(host):
        timing.capture([lambda: seen.append(gc.isenabled())])
    assert seen == [True, False] and gc.isenabled()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_collects_though_its_parent_captured(collector):
    with driver.without_collections():
        child = os.fork()
        if not child:
            os._exit(not gc.isenabled())
        assert os.waitpid(child, 0)[1] == 0 and not gc.isenabled()


@pytest.mark.gpu
def test_torchs_own_streams_last_and_others_may_not(torch):
    import cupy

    x, w = torch.ones(64, device="cuda"), torch.ones(8, 64, device="cuda")
    own, foreign = torch.cuda.Stream(), cupy.cuda.Stream(non_blocking=True)
    torch.cuda.synchronize()
    for stream in (own, torch.cuda.ExternalStream(foreign.ptr)):
        with torch.cuda.stream(stream):
            assert psc.ffn_1(x, w).tolist() == [64.0] * 8
    assert own.cuda_stream in driver.lasting_streams and foreign.ptr not in driver.lasting_streams


@pytest.mark.gpu
def test_a_launch_that_the_gpu_cannot_do_is_an_error():
    import cupy

    for target in (PORTABLE, HOPPER):
        plan = plan_of("ffn_4", Shape(64, 64, "bfloat16", target=target))
        kernel = compiler.Kernel(dataclasses.replace(plan, block=(4096, 1, 1)), 0)
        w, y = on.put(weights(64, 64, "bfloat16")), on.put(poisoned(64, "bfloat16"))
        with pytest.raises(cupy.cuda.driver.CUDADriverError):
            kernel.launch(0, True, y.data.ptr, w.data.ptr, y.data.ptr, 64, 64, 0, 0, 0.0)
