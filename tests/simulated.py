"""GPUs made up for tests: CuPy and the driver as far as the package calls them, with launches that run on the host.

`simulated` puts a stand-in for CuPy in the place of the real one, so that what a caller calls runs from its arguments to its
results without a GPU: packing, streams, devices, scratch, graphs. What is launched waits in its stream, and runs when somebody
waits for it, in an order that is drawn among those that streams and events allow: what leans on another order shows. Kernels
are compiled and run by `host_cuda`, from the source and the options that NVRTC would get, and memory is as large as it was
asked for, so the sanitizers see every access.

Made for what can go wrong behind a launch: a pointer or a dim in another's place, a lost threshold, the wrong stream, GPU or
kernel, scratch that two calls share.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import random
import struct
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes  # noqa: F401  NumPy knows bfloat16 by it
import numpy as np
from host_cuda import HostKernels

_ALIGNMENT = 256
_WAIT_FREE = 1 << 12  # launches that may wait before some are run, so that a test of many calls stays small
_OUT_OF_MEMORY, _INVALID, _UNSUPPORTED, _ILLEGAL_ADDRESS, _CAPTURE_UNSUPPORTED = 2, 1, 801, 700, 900


class CudaError(RuntimeError):
    """CuPy's errors of the runtime and the driver."""

    def __init__(self, status: int, why: str = "") -> None:
        super().__init__(f"status {status}: {why}")
        self.status = status


class Memory:
    """An allocation, of exactly its size."""

    def __init__(self, nbytes: int, device: int) -> None:
        room = np.full(nbytes + _ALIGNMENT, 0xFF, np.uint8)
        start = -room.ctypes.data % _ALIGNMENT
        self.bytes = room[start : start + nbytes]
        self.address, self.nbytes, self.device = self.bytes.ctypes.data, nbytes, device


class Work:
    """What has been given to a stream and may not have happened yet."""

    def __init__(self, run: Callable[[], None], after: list[Work]) -> None:
        self.run, self.after, self.done = run, [w for w in after if not w.done], False


@dataclass
class Launched:
    """A kernel launch as it was asked for."""

    kernel: str
    defines: dict[str, str]
    device: int
    stream: int
    """Its id, which no other stream has."""
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    overlaps: bool
    """Whether it may start before its predecessor's end."""
    arguments: tuple[int | float, ...]


@dataclass
class _Function:
    kernel: str
    code: str
    options: tuple[str, ...]
    device: int
    max_dynamic_shared_size_bytes: int = 48 * 1024
    library: Any = None

    @property
    def defines(self) -> dict[str, str]:
        named = (o[2:].partition("=") for o in self.options if o.startswith("-D"))
        return {name: value for name, _, value in named}


@dataclass(eq=False)
class _Stream:
    ident: int
    device: int
    is_blocking: bool
    last: list[Work] = field(default_factory=list)
    graph: Graph | None = None
    mode: int = 2


class Graph:
    """A CUDA graph: launches to be made again and again."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda, self.nodes, self.handle = cuda, [], next(cuda.handles)
        self.owned: list[tuple[int, int]] = []
        self._launched: list[Work] = []
        weakref.finalize(self, _destroy_graph, cuda, self.owned, self._launched)

    def launch(self, stream: Any = None) -> None:
        handle = self._cuda.current_stream() if stream is None else stream.ptr
        nodes = [*self.nodes]
        self._launched.append(self._cuda.enqueue(handle, lambda: [run() for run in nodes] and None))


def _destroy_graph(cuda: Cuda, owned: list[tuple[int, int]], launched: list[Work]) -> None:
    """Once its launches are done, the destructors of what it owns are called, each with its one argument."""

    def end() -> None:
        for destructor, argument in owned:
            ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_void_p)(destructor)(argument)

    if all(work.done for work in launched):
        end()
    else:
        cuda.waiting.append(Work(end, launched))


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.device = 0
        self.streams: dict[int, list[int]] = {}
        self.capture_mode = 0
        self.default_stream: int | None = None


class Cuda:
    """The simulated GPUs, and what has been done with them."""

    def __init__(self, host: HostKernels, gpus: int = 1, seed: int | None = None, capability: int = 90) -> None:
        self.host, self.gpus, self.capability = host, gpus, capability
        self.seed = random.randrange(2**32) if seed is None else seed
        self.random = random.Random(self.seed)
        self.launches: list[Launched] = []
        self.allocated: list[Memory] = []
        """What was asked of the driver itself, in order: scratch."""
        self.fails: dict[str, int] = {}
        """How many of the next calls of a function of the driver fail, for want of memory."""
        self.before_launch: Callable[[], None] = lambda: None
        """Called when the driver is asked for a launch, before it looks at the arguments: for threads to meet there."""
        self.waiting: list[Work] = []
        self.handles = itertools.count(0x5000, 16)
        self._idents = itertools.count(10)
        self._free_handles: list[int] = []
        self._memory: dict[int, weakref.ref[Memory]] = {}
        self._streams: dict[int, _Stream] = {}
        self._legacy = {i: _Stream(next(self._idents), i, True) for i in range(gpus)}
        self._functions: dict[int, _Function] = {}
        self._owners: dict[int, tuple[int, int]] = {}
        self._captured: weakref.WeakValueDictionary[int, Graph] = weakref.WeakValueDictionary()
        self._lock = threading.RLock()
        self.thread = _PerThread()
        self.module = _module_of(self)

    # Memory

    def allocate(self, nbytes: int, device: int | None = None) -> Memory:
        memory = Memory(nbytes, self.thread.device if device is None else device)
        with self._lock:
            self._memory[memory.address] = weakref.ref(memory)
            weakref.finalize(memory, self._memory.pop, memory.address, None)
        return memory

    def malloc(self, nbytes: int) -> int:
        self._refuse_in_captures("cudaMalloc")
        self._perhaps_fail("malloc")
        memory = self.allocate(nbytes)
        self.allocated.append(memory)
        return memory.address

    def set_bytes(self, address: int, value: int, nbytes: int, stream: int) -> None:
        memory = self.memory_at(address)
        assert memory is not None, "cudaMemsetAsync of no memory"
        start = address - memory.address
        if start + nbytes > memory.nbytes:
            raise self.module.cuda.runtime.CUDARuntimeError(_INVALID, "cudaMemsetAsync beyond the end of the memory")

        def run() -> None:
            memory.bytes[start : start + nbytes] = value

        self.enqueue(stream, run)

    def memory_at(self, address: int) -> Memory | None:
        with self._lock:
            alive = [m for ref in self._memory.values() if (m := ref()) is not None]
        return next((m for m in alive if m.address <= address < m.address + max(m.nbytes, 1)), None)

    def _perhaps_fail(self, what: str) -> None:
        if self.fails.get(what, 0) > 0:
            self.fails[what] -= 1
            raise self.module.cuda.runtime.CUDARuntimeError(_OUT_OF_MEMORY, what)

    # Streams

    def new_stream(self, is_blocking: bool) -> int:
        with self._lock:
            handle = self._free_handles.pop() if self._free_handles else next(self.handles)
            self._streams[handle] = _Stream(next(self._idents), self.thread.device, is_blocking)
        return handle

    def destroy_stream(self, handle: int) -> None:
        """What is in flight goes on; the handle may be given out again at once."""
        with self._lock:
            stream = self._streams.pop(handle)
            self._legacy[stream.device].last += stream.last if stream.is_blocking else []
            self._free_handles.append(handle)

    def stream(self, handle: int, device: int | None = None) -> _Stream:
        if handle == 2:  # the thread's own default stream
            if self.thread.default_stream is None:
                self.thread.default_stream = self.new_stream(True)
            handle = self.thread.default_stream
        if handle in (0, 1):
            return self._legacy[self.thread.device if device is None else device]
        try:
            return self._streams[handle]
        except KeyError:
            raise CudaError(_INVALID, f"no stream has the handle {handle}") from None

    def current_stream(self, device: int | None = None) -> int:
        entered = self.thread.streams.get(self.thread.device if device is None else device)
        return entered[-1] if entered else 0

    def enqueue(self, handle: int, run: Callable[[], None]) -> Work:
        """Give work to a stream, or to the graph that it is captured into."""
        with self._lock:
            stream = self.stream(handle)
            if stream.graph is not None:
                stream.graph.nodes.append(run)
                return Work(run, [])
            legacy = self._legacy[stream.device]
            after = [*stream.last]
            if stream is legacy:
                after += [w for s in self._streams.values() if s.is_blocking and s.device == s.device for w in s.last]
            elif stream.is_blocking:
                after += legacy.last
            work = Work(run, after)
            stream.last = [work]
            self.waiting.append(work)
            if len(self.waiting) > _WAIT_FREE:
                self.finish(self.waiting[: _WAIT_FREE // 2])
            return work

    def wait_for(self, handle: int, works: list[Work]) -> None:
        """Have a stream wait for work of others."""
        with self._lock:
            self.stream(handle).last += [w for w in works if not w.done]

    def finish(self, works: list[Work] | None = None) -> None:
        """Run these and what they come after, or all; among what may be next, any is."""
        with self._lock:
            while wanted := [w for w in (self.waiting if works is None else works) if not w.done]:
                needed, found = [*wanted], {id(w) for w in wanted}
                for work in needed:
                    for before in work.after:
                        if not before.done and id(before) not in found:
                            found.add(id(before))
                            needed.append(before)
                work = self.random.choice([w for w in needed if all(b.done for b in w.after)])
                work.done, work.after = True, []
                work.run()
                self.waiting = [w for w in self.waiting if not w.done]

    def synchronize(self, handle: int | None = None) -> None:
        """Wait for a stream, or for everything."""
        if handle is None:
            self.finish()
            return
        stream = self.stream(handle)
        legacy = stream is self._legacy[stream.device]
        others = [w for s in self._streams.values() if s.is_blocking for w in s.last] if legacy else []
        self.finish([*stream.last, *others])

    def begin_capture(self, handle: int, mode: int) -> None:
        stream = self.stream(handle)
        assert handle > 1 and stream.graph is None
        stream.graph, stream.mode = Graph(self), mode
        self._captured[stream.graph.handle] = stream.graph

    def end_capture(self, handle: int) -> Graph:
        stream = self.stream(handle)
        graph, stream.graph = stream.graph, None
        assert graph is not None
        if graph.nodes and graph.nodes[-1] is None:
            raise CudaError(_CAPTURE_UNSUPPORTED, "the capture was broken")
        return graph

    def _refuse_in_captures(self, what: str) -> None:
        """Where any stream is captured in the global mode, threads must say that they mean it."""
        captured = [s for s in self._streams.values() if s.graph is not None and s.mode == 0]
        if captured and self.thread.capture_mode != 2:
            for stream in captured:
                stream.graph.nodes.append(None)
            raise self.module.cuda.runtime.CUDARuntimeError(_CAPTURE_UNSUPPORTED, f"{what} while a stream is captured")

    # Kernels

    def load(self, kernel: str, code: str, options: tuple[str, ...]) -> int:
        handle = next(self.handles)
        self._functions[handle] = _Function(kernel, code, options, self.thread.device)
        return handle

    def function(self, handle: int) -> _Function:
        return self._functions[handle]

    def launch(self, handle: int, shape: tuple[int, ...], stream: int, slots: int, overlaps: bool) -> None:
        """`slots` is where pointers to the arguments lie."""
        self.before_launch()
        function = self.function(handle)
        grid, block, shared = shape[:3], shape[3:6], shape[6]
        if self.thread.device != function.device or self.stream(stream).device != function.device:
            raise CudaError(400, "a kernel of one GPU, with another one current, or on a stream of another one")
        is_launchable = all(grid) and all(block) and np.prod(block) <= 1024 and grid[1] <= 65535 and grid[2] <= 65535
        if not is_launchable or shared > function.max_dynamic_shared_size_bytes:
            raise CudaError(_INVALID, f"{function.kernel} cannot be launched in {shape}")
        if overlaps and self.capability < 90:
            raise CudaError(_UNSUPPORTED, "programmatic launches need compute capability 9.0")
        with self._lock:
            if function.library is None:
                defines = tuple((name, value or None) for name, value in function.defines.items())
                function.library = self.host.build(function.kernel, function.code, defines)
                function.kinds = self.host.parameters(function.library)  # type: ignore[attr-defined]
        addresses = struct.unpack(f"{len(function.kinds)}Q", ctypes.string_at(slots, 8 * len(function.kinds)))
        raw = [ctypes.string_at(at, 8 * len(kind)) for at, kind in zip(addresses, function.kinds, strict=True)]
        values = tuple(v for kind, r in zip(function.kinds, raw, strict=True) for v in _values(kind, r))
        ident = self.stream(stream).ident
        self.launches.append(
            Launched(function.kernel, function.defines, function.device, ident, grid, block, shared, overlaps, values)
        )
        memories: list[Memory] = []
        parts = []
        for kind, bytes_ in zip(function.kinds, raw, strict=True):
            if kind in "fi":
                parts.append((bytes_,))
                continue
            pointers = []
            for pointer in struct.unpack(f"{len(kind)}Q", bytes_):
                is_number = not pointer or (len(kind) > 1 and pointer >> 32 == 1)  # nothing, or the base of a compressed weight
                memory = None if is_number else self.memory_at(pointer)
                if not is_number and (memory is None or memory.device != function.device):
                    raise CudaError(
                        _ILLEGAL_ADDRESS, f"{function.kernel} gets an address where GPU {function.device} has nothing"
                    )
                if memory is None:
                    pointers.append(pointer.to_bytes(8, "little"))
                    continue
                if memory not in memories:
                    memories.append(memory)
                pointers.append((memories.index(memory), pointer - memory.address))
            parts.append(tuple(pointers))

        def run() -> None:
            buffers = [m.bytes.tobytes() for m in memories]
            changed = self.host.launch(function.library, grid, block, parts, buffers, self.random.randrange(2**32))
            for i, now in changed.items():
                memories[i].bytes[:] = np.frombuffer(now, np.uint8)

        self.enqueue(stream, run)

    # The driver, through addresses as ctypes hands them over

    def driver_function(self, name: str, arguments: list[Any]) -> Callable[..., int] | None:
        """What stands for a function of libcuda."""
        return getattr(self, f"_{name}")

    def _cuLaunchKernelEx(self, config: int, function: int, slots: int, extra: Any) -> int:
        *shape, stream, attribute, count = struct.unpack("7I4xQQI4x", ctypes.string_at(config, 56))
        overlaps = False
        if count:
            ident, value = struct.unpack("i4xi60x", ctypes.string_at(attribute, 72))
            assert (count, ident) == (1, 6)
            overlaps = bool(value)
        try:
            self.launch(function, tuple(shape), stream, slots, overlaps)
        except CudaError as error:
            return error.status
        return 0

    def _cuStreamGetId(self, handle: int, out: int) -> int:
        try:
            ident = self.stream(handle).ident
        except CudaError as error:
            return error.status
        ctypes.c_uint64.from_address(out).value = ident
        return 0

    def _cuStreamGetCaptureInfo_v2(self, handle: int, status: int, ident: int, graph: int, *rest: Any) -> int:
        captured = self.stream(handle).graph
        ctypes.c_int.from_address(status).value = captured is not None
        ctypes.c_void_p.from_address(graph).value = captured.handle if captured else None
        return 0

    def _cuUserObjectCreate(self, out: int, argument: int, destructor: Any, count: int, flags: int) -> int:
        assert (count, flags) == (1, 1)
        handle = next(self.handles)
        self._owners[handle] = (destructor.value, argument)
        ctypes.c_void_p.from_address(out).value = handle
        return 0

    def _cuGraphRetainUserObject(self, graph: int, owner: Any, count: int, flags: int) -> int:
        assert (count, flags) == (1, 1)
        self._captured[graph].owned.append(self._owners.pop(owner.value))
        return 0

    def _cuThreadExchangeStreamCaptureMode(self, mode: int) -> int:
        word = ctypes.c_int.from_address(mode)
        self.thread.capture_mode, word.value = word.value, self.thread.capture_mode
        return 0


def _values(kind: str, raw: bytes) -> tuple[int | float, ...]:
    return struct.unpack("".join({"P": "Q", "f": "f4x", "i": "i4x"}[c] for c in kind), raw)


def _module_of(cuda: Cuda) -> Any:
    """The stand-in for CuPy: its arrays, and what it shows of the runtime and the driver."""

    class CUDARuntimeError(CudaError):
        pass

    class CUDADriverError(CudaError):
        pass

    class ndarray(np.lib.mixins.NDArrayOperatorsMixin):
        """An array on a simulated GPU. All that is done with it, kernels apart, happens in its place in the current stream."""

        def __init__(self, array: np.ndarray, memory: Memory) -> None:
            self._array, self._memory = array, memory

        @property
        def data(self) -> Any:
            return SimpleNamespace(ptr=self._array.ctypes.data, device_id=self._memory.device, mem=self._memory)

        @property
        def device(self) -> Device:
            return Device(self._memory.device)

        @property
        def flags(self) -> Any:
            return self._array.flags

        def get(self) -> np.ndarray:
            cuda.synchronize(cuda.current_stream(self._memory.device))
            return self._array.copy()

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            found = getattr(self._array, name)
            return of_gpu(found) if callable(found) else wrapped(found)

        def __array_ufunc__(self, ufunc: Any, method: str, *arguments: Any, **keywords: Any) -> Any:
            return of_gpu(getattr(ufunc, method))(*arguments, **keywords)

        def __getitem__(self, key: Any) -> Any:
            return of_gpu(self._array.__getitem__)(key)

        def __setitem__(self, key: Any, value: Any) -> None:
            of_gpu(self._array.__setitem__)(key, value)

        def __len__(self) -> int:
            return len(self._array)

        def __iter__(self) -> Iterator[Any]:
            return (self[i] for i in range(len(self)))

        def __bool__(self) -> bool:
            return bool(self.get())

        def __int__(self) -> int:
            return int(self.get())

        def __float__(self) -> float:
            return float(self.get())

        __index__ = __int__

        def __array__(self, *_: Any, **__: Any) -> Any:
            raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def plain(value: Any) -> Any:
        if isinstance(value, ndarray):
            return value._array
        if isinstance(value, (tuple, list)):
            return type(value)(map(plain, value))
        return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value

    def wrapped(value: Any) -> Any:
        """Results of NumPy in memory of a GPU; views stay views."""
        if isinstance(value, (tuple, list)) and any(isinstance(v, (np.ndarray, np.generic)) for v in value):
            return type(value)(map(wrapped, value))
        if not isinstance(value, (np.ndarray, np.generic)):
            return value
        array = np.asarray(value)
        memory = cuda.memory_at(array.ctypes.data)
        if memory is None:
            memory = cuda.allocate(array.nbytes)
            own = memory.bytes.view(array.dtype).reshape(array.shape) if array.size else np.empty(array.shape, array.dtype)
            own[...] = array
            array = own
        return ndarray(array, memory)

    def of_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            cuda.synchronize(cuda.current_stream())
            return wrapped(function(*plain(arguments), **plain(keywords)))

        return call

    class Device:
        def __init__(self, ident: int | None = None) -> None:
            self.id, self._before = cuda.thread.device if ident is None else int(ident), []

        def __enter__(self) -> Device:
            self._before.append(cuda.thread.device)
            set_device(self.id)
            return self

        def __exit__(self, *_: Any) -> None:
            cuda.thread.device = self._before.pop()

        def use(self) -> None:
            set_device(self.id)

        def synchronize(self) -> None:
            cuda.synchronize()

    class Stream:
        null: Any

        def __init__(self, null: bool = False, non_blocking: bool = False, ptds: bool = False) -> None:
            is_own = not (null or ptds)
            self.ptr = cuda.new_stream(not non_blocking) if is_own else 2 if ptds else 0
            self.device_id = cuda.thread.device
            if is_own:
                weakref.finalize(self, cuda.destroy_stream, self.ptr)

        def __enter__(self) -> Stream:
            cuda.thread.streams.setdefault(cuda.thread.device, []).append(self.ptr)
            return self

        def __exit__(self, *_: Any) -> None:
            cuda.thread.streams[cuda.thread.device].pop()

        def synchronize(self) -> None:
            cuda.synchronize(self.ptr)

        def begin_capture(self, mode: int = 2) -> None:
            cuda.begin_capture(self.ptr, mode)

        def end_capture(self) -> Graph:
            return cuda.end_capture(self.ptr)

        def wait_event(self, event: Event) -> None:
            cuda.wait_for(self.ptr, event.recorded)

        def record(self, event: Event | None = None) -> Event:
            event = event or Event()
            record(event.ptr, self.ptr)
            return event

    events: weakref.WeakValueDictionary[int, Event] = weakref.WeakValueDictionary()

    class Event:
        def __init__(self, block: bool = False, disable_timing: bool = False) -> None:
            self.ptr, self.recorded = next(cuda.handles), []
            events[self.ptr] = self

        @property
        def done(self) -> bool:
            cuda._refuse_in_captures("cudaEventQuery")
            return all(work.done for work in self.recorded)

    def record(event: int, stream: int) -> None:
        events[event].recorded = [*cuda.stream(stream).last]

    class RawModule:
        def __init__(self, *, code: str, options: tuple[str, ...] = ()) -> None:
            self._code, self._options = code, options

        def get_function(self, name: str) -> Any:
            return _RawKernel(cuda, cuda.load(name, self._code, self._options))

    def set_device(index: int) -> None:
        if not 0 <= index < cuda.gpus:
            raise CUDARuntimeError(101, f"there is no GPU {index}")
        cuda.thread.device = index

    def properties(index: int) -> dict[str, Any]:
        name = b"NVIDIA H100 80GB HBM3"
        return {"name": name, "major": cuda.capability // 10, "minor": cuda.capability % 10, "multiProcessorCount": 132}

    def empty(shape: Any, dtype: Any = float) -> ndarray:
        cuda._perhaps_fail("empty")
        dtype, count = np.dtype(dtype), int(np.prod(shape))
        memory = cuda.allocate(count * dtype.itemsize)
        return ndarray(memory.bytes.view(dtype).reshape(shape), memory)

    def launch_kernel(function: int, *rest: int) -> None:
        *shape, stream, slots, _ = rest
        try:
            cuda.launch(function, tuple(shape), stream, slots, False)
        except CudaError as error:
            raise CUDADriverError(error.status, str(error)) from None

    def get_current_stream(device: int | None = None) -> Any:
        return SimpleNamespace(ptr=cuda.current_stream(device))

    runtime = SimpleNamespace(
        CUDARuntimeError=CUDARuntimeError,
        getDeviceCount=lambda: cuda.gpus,
        getDevice=lambda: cuda.thread.device,
        setDevice=set_device,
        getDeviceProperties=properties,
        malloc=cuda.malloc,
        memsetAsync=cuda.set_bytes,
        streamIsCapturing=lambda handle: cuda.stream(handle).graph is not None,
        eventRecord=record,
        deviceSynchronize=cuda.synchronize,
    )

    class _Cupy(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return of_gpu(getattr(np, name))

    module: Any = _Cupy("cupy")
    Stream.null = Stream(null=True)
    module.__version__ = "simulated"
    module.ndarray, module.RawModule, module.empty = ndarray, RawModule, empty
    module.get_default_memory_pool = lambda: SimpleNamespace(free_all_blocks=lambda: None)
    module.cuda = SimpleNamespace(
        runtime=runtime,
        driver=SimpleNamespace(CUDADriverError=CUDADriverError, launchKernel=launch_kernel),
        compiler=SimpleNamespace(CompileException=type("CompileException", (Exception,), {})),
        Device=Device,
        Stream=Stream,
        Event=Event,
        get_current_stream=get_current_stream,
    )
    return module


class _RawKernel:
    """A function of a module, as CuPy shows it."""

    def __init__(self, cuda: Cuda, handle: int) -> None:
        self._function, self.kernel = cuda.function(handle), SimpleNamespace(ptr=handle)

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return self._function.max_dynamic_shared_size_bytes

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, nbytes: int) -> None:
        self._function.max_dynamic_shared_size_bytes = nbytes


@contextmanager
def simulated(host: HostKernels, gpus: int = 1, seed: int | None = None, capability: int = 90) -> Iterator[Cuda]:
    """Simulated GPUs in the place of CuPy and the driver; what the package remembers of others is put away meanwhile."""
    from prosparse_cupy import driver, workspace

    cuda = Cuda(host, gpus, seed, capability)
    kept = [driver.lasting_streams, workspace._homes, workspace._passing, workspace._graphs, workspace._idle]
    before = [container.copy() for container in kept]
    modules, function = sys.modules.get("cupy"), driver._function
    _forget()
    try:
        sys.modules["cupy"], driver._function = cuda.module, cuda.driver_function
        for container in kept[1:]:
            container.clear()
        yield cuda
        cuda.synchronize()
    finally:
        for container, was in zip(kept, before, strict=True):
            container.clear()
            container.extend(was) if isinstance(container, list) else container.update(was)
        driver._function = function
        if modules is None:
            del sys.modules["cupy"]
        else:
            sys.modules["cupy"] = modules
        _forget()


def _forget() -> None:
    """Clear all that the package has cached."""
    for name, module in [*sys.modules.items()]:
        if name.partition(".")[0] == "prosparse_cupy":
            for value in [*vars(module).values()]:
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
