"""What CuPy lacks of the driver, called through ctypes: programmatic launches, and what scratch memory must know.

CuPy's own launch knows no launch attributes, so cuLaunchKernelEx is called with its arguments packed in one go; where the
driver lacks it, launches go through CuPy and wait for their predecessor's end as ever.
"""

from __future__ import annotations

import ctypes
import gc
import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import accumulate
from typing import Any

from .device import cupy
from .launch import Launch

_SLOT = 8  # bytes of a number or a pointer among the arguments
# CUlaunchConfig: grid, block and dynamic shared memory; then stream, attributes and their number.
_SHAPE, _REST = struct.Struct("7I4x"), "QQI4x"
_CONFIG_BYTES = _SHAPE.size + struct.calcsize(_REST)
# CUlaunchAttribute: id, and a union of 64 bytes at offset 8. CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION is 6.
_PROGRAMMATIC = ctypes.create_string_buffer(struct.pack("i4xi60x", 6, 1))

Launcher = Callable[..., None]

LEGACY = 1  # handles 0 and 1 are the legacy default stream's, which is neither captured nor destroyed
lasting_streams = {0, LEGACY}
"""Handles of streams that are never destroyed: the legacy default stream's two, and those that torch keeps in its pool.

Launches are programmatic on these and in captures alone. Otherwise the GPU can hang: `ffn_4` fills it, waiting for predecessors
that find no room on it. On an H100 with driver 580.159 it hung in 12 of 187 processes that destroyed streams under programmatic
launches and then used new ones, if other streams had been made and destroyed before, and in none of 87 without those. It hung
in none of 336 whose streams were kept or whose `ffn_4` was launched plainly.
"""


class _Buffer(threading.local):
    """A thread's room for one kernel's launches: the configuration, then the arguments, and pointers to each of these."""

    def __init__(self, shape: tuple[int, ...], arguments: tuple[str, ...], device: int) -> None:
        cupy().cuda.runtime.setDevice(device)  # binds the GPU's primary context to a thread that has none yet
        ends = [*accumulate((_SLOT * len(a) for a in arguments), initial=_CONFIG_BYTES)]
        self.bytes = ctypes.create_string_buffer(ends[-1])
        _SHAPE.pack_into(self.bytes, 0, *shape)
        self.config = ctypes.addressof(self.bytes)
        self._pointers = (ctypes.c_void_p * len(arguments))(*(self.config + start for start in ends[:-1]))
        self.arguments = ctypes.addressof(self._pointers)


def launcher(function: int, plan: Launch, device: int) -> Launcher:
    """A function that launches `function` (a CUfunction), loaded on GPU `device`, as planned.

    It takes a stream of that GPU, whether the launch may overlap with its predecessor there (`overlaps`), and the kernel's
    arguments.
    """
    current, on_device = cupy().cuda.runtime.getDevice, cupy().cuda.Device
    shape = (*plan.grid, *plan.block, plan.shared_bytes)
    buffer = _Buffer(shape, plan.arguments, device)
    pack = struct.Struct(_REST + "".join(map(_slot, "".join(plan.arguments)))).pack_into
    start = _SHAPE.size
    extended = launch_kernel_ex() if plan.programmatic else None

    def plain(stream: int, overlaps: bool, *arguments: int | float) -> None:
        if current() != device:
            with on_device(device):
                return plain(stream, overlaps, *arguments)
        pack(buffer.bytes, start, stream, 0, 0, *arguments)
        cupy().cuda.driver.launchKernel(function, *shape, stream, buffer.arguments, 0)
        return None

    if extended is None:
        return plain
    launch, attribute = extended, ctypes.addressof(_PROGRAMMATIC)

    def programmatic(stream: int, overlaps: bool, *arguments: int | float) -> None:
        if current() != device:
            with on_device(device):
                return programmatic(stream, overlaps, *arguments)
        pack(buffer.bytes, start, stream, attribute, overlaps, *arguments)
        status = launch(buffer.config, function, buffer.arguments, None)
        if status:
            raise cupy().cuda.driver.CUDADriverError(status)
        return None

    return programmatic


def is_captured(stream: int) -> bool:
    """Whether what is launched on a stream goes into a graph: 0.14 to 0.5 µs, so that a call asks once."""
    return stream > LEGACY and is_capturing()(stream)


def overlaps(stream: int, captured: bool | None = None) -> bool:
    """Whether launches on a stream are programmatic, see `lasting_streams`; `captured` where `is_captured` was asked before."""
    return stream in lasting_streams or (is_capturing()(stream) if captured is None else captured)


@cache
def is_capturing() -> Callable[[int], bool]:
    """A function that tells whether a stream is being captured into a graph."""
    asked: Callable[[int], bool] = cupy().cuda.runtime.streamIsCapturing
    return asked


def _slot(character: str) -> str:
    """A number or a pointer in `struct` characters, padded to a slot."""
    return character + "x" * (_SLOT - struct.calcsize(character))


@cache
def launch_kernel_ex() -> Callable[..., int] | None:
    """The driver's cuLaunchKernelEx (CUDA 11.8), or None where it cannot be found."""
    return _function("cuLaunchKernelEx", 4 * [ctypes.c_void_p])


def _function(name: str, arguments: list[Any]) -> Callable[..., int] | None:
    """A function of the driver, or None where it cannot be found."""
    try:
        function: Any = getattr(ctypes.CDLL("libcuda.so.1"), name)
    except (OSError, AttributeError):
        return None
    function.argtypes = arguments
    called: Callable[..., int] = function
    return called


@cache
def _required(name: str, *arguments: Any) -> Callable[..., int]:
    """A function that every CUDA 12 driver has."""
    function = _function(name, [*arguments])
    if function is None:
        raise RuntimeError(f"prosparse_cupy: the driver has no {name}: it must be one for CUDA 12 or later")
    return function


def _check(status: int) -> None:
    """Raise what the driver refuses."""
    if status:
        raise cupy().cuda.driver.CUDADriverError(status)


class _Word(threading.local):
    """A thread's 64-bit word for the driver to write into."""

    def __init__(self) -> None:
        self.word = ctypes.c_uint64()
        self.address = ctypes.addressof(self.word)


_written = _Word()
_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_uint


def stream_id(stream: int) -> int:
    """The id of the stream behind a handle: never given to another stream, and each thread's default stream has its own."""
    status = _get_stream_id()(stream, _written.address)
    if status:
        _check(status)
    return _written.word.value


@cache
def _get_stream_id() -> Callable[..., int]:
    return _required("cuStreamGetId", _POINTER, _POINTER)


class DestructionMark:
    """A word that is set once the driver has destroyed all of a graph: itself, what was instantiated of it, and their launches.

    The graph owns a CUDA user object. Its destructor runs in a thread of the driver, perhaps after Python's end, so it is a C
    function that needs nothing but its one argument: `time`, which also stores the time at that address.
    """

    def __init__(self, stream: int) -> None:
        """Of the graph that `stream` is captured into."""
        create = _required("cuUserObjectCreate", _POINTER, _POINTER, _POINTER, _NUMBER, _NUMBER)
        retain = _required("cuGraphRetainUserObject", _POINTER, _POINTER, _NUMBER, _NUMBER)
        no_synchronisation = move = 1
        self._word = _libc().calloc(1, 8)
        owner, destructor = ctypes.c_void_p(), ctypes.cast(_libc().time, _POINTER)
        _check(create(ctypes.addressof(owner), self._word, destructor, 1, no_synchronisation))
        _check(retain(_captured_graph(stream), owner, 1, move))

    def is_set(self) -> bool:
        return ctypes.c_int64.from_address(self._word).value != 0

    def free(self) -> None:
        """Free the word, once it is set."""
        _libc().free(self._word)


def _captured_graph(stream: int) -> int | None:
    status, ident, graph = ctypes.c_int(), ctypes.c_uint64(), ctypes.c_void_p()
    found = map(ctypes.addressof, (status, ident, graph))
    _check(_required("cuStreamGetCaptureInfo_v2", *6 * [_POINTER])(stream, *found, None, None))
    return graph.value


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.calloc.argtypes, libc.calloc.restype = [ctypes.c_size_t, ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
    return libc


@contextmanager
def allowed_during_captures() -> Iterator[None]:
    """Lets this thread do what would break a capture that waits for it: allocate, and ask whether an event has happened."""
    exchange = _required("cuThreadExchangeStreamCaptureMode", _POINTER)
    mode = ctypes.c_int(2)  # CU_STREAM_CAPTURE_MODE_RELAXED
    _check(exchange(ctypes.addressof(mode)))
    try:
        yield
    finally:
        _check(exchange(ctypes.addressof(mode)))


class _Collector:
    """Python's garbage collector, which is off while somebody holds it, and comes back on if it was on."""

    def __init__(self) -> None:
        self.lock, self.was_on = threading.RLock(), False  # a signal's handler may capture too
        self.holders: set[object] = set()

    def hold(self, holder: object) -> None:
        with self.lock:
            self.holders.add(holder)  # first: who comes in between must not turn it on
            if gc.isenabled():
                self.was_on = True
            gc.disable()

    def let_go(self, holder: object) -> None:
        with self.lock:
            self.holders.discard(holder)
            if not self.holders:
                self.restore()

    def restore(self) -> None:
        if self.was_on:
            gc.enable()
        self.was_on = False


_collector = _Collector()


@contextmanager
def without_collections() -> Iterator[None]:
    """Keeps Python from collecting garbage by itself: a CUDA graph in it must not be destroyed by a thread that captures.

    A graph in a reference cycle lives until a collection, which may begin in any thread and at any line. CUDA does not let a
    thread destroy a graph while it captures another, and gives the capture up. The collector is the process's, so it is off for
    all threads meanwhile; what others do to it by `gc.enable` or `gc.disable` until the end is undone then.
    """
    capture = object()
    try:
        _collector.hold(capture)
        yield
    finally:
        try:
            _collector.let_go(capture)
        except BaseException:  # an interrupt: once more, which changes nothing that is done
            _collector.let_go(capture)
            raise


def _collect_as_before() -> None:
    """In a forked process: the threads that captured are not here."""
    global _collector
    _collector.restore()
    _collector = _Collector()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_collect_as_before)
