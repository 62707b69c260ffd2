"""Scratch memory for what an FFN hands from its first launch to its second: one policy for every caller.

A call takes an address, launches both kernels, and gives the address back, without waiting for the GPU. What was used on a
stream is handed out on that stream alone, where the next call's launches follow the last one's, and to one call at a time, so
threads that share a stream do not share scratch. A captured call's address belongs to the graph until the driver has destroyed
the graph.

Streams are told apart by their ids, which are unique in a process. A handle is not: it is given out again as soon as its
stream is destroyed, while that stream's last launches may still run. The memory comes from cudaMalloc and not from an array
library, whose allocator would give it to others while a stream or a graph that it does not know still writes there.

Nobody says when a stream is gone. So only the first streams of a process have scratch of their own; each call on another
records an event behind its launches, and its scratch serves any stream once that event has happened.
"""

from __future__ import annotations

import sys
import threading
from collections import defaultdict, deque
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

from . import driver
from .device import cupy
from .tensor_cores import TICKET_BYTES

_LEGACY_ID = -1  # stands for the legacy stream's; the driver gives no stream this id
_MOST_HOMES = 64  # streams and sizes with scratch of their own; the others record and ask for an event at every call
_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation


class Home(Protocol):
    """Where an address comes from and goes back to."""

    def append(self, address: int, /) -> None: ...


class WithTickets(NamedTuple):
    """So many bytes behind `TICKET_BYTES` of tickets: counters that are zero at first, and that every use leaves zero."""

    behind: int


Size = int | WithTickets  # no WithTickets equals a number, so no other use gets its memory


class _OfGraph(NamedTuple):
    """An address that a CUDA graph owns."""

    device: int
    size: Size
    address: int
    destroyed: driver.DestructionMark


_homes: dict[tuple[int, int, Size], list[int]] = {}
"""The free addresses of a stream, by device, stream id and size."""
_passing: defaultdict[tuple[int, Size], deque[tuple[Any, int]]] = defaultdict(deque)
"""Addresses, each with the event after which it is free, by device and size."""
_graphs: list[_OfGraph] = []
_idle: defaultdict[tuple[int, Size], list[int]] = defaultdict(list)
"""Addresses that nothing uses, by device and size."""
_lock = threading.RLock()  # not for the single operations on lists and dicts that a running call needs, which are atomic


def size_class(nbytes: int) -> int:
    """The size that is allocated for `nbytes`: one of few, so that what one shape leaves serves another."""
    return max(4096, 1 << (nbytes - 1).bit_length())


def with_tickets(nbytes: int) -> WithTickets:
    """The size that is allocated for `nbytes` and tickets."""
    return WithTickets(size_class(nbytes))


def take(stream: int, device: int, size: Size, captured: bool) -> tuple[int, Home]:
    """Scratch for launches on `stream` (a `cudaStream_t`), `captured` into a graph or not.

    `size` is a `size_class` or `with_tickets`. Returns the address and the home to which the caller appends it when
    its launches are made.
    """
    if captured:
        return _for_graph(stream, device, size), []
    ident = driver.stream_id(stream) if stream > driver.LEGACY else _LEGACY_ID
    try:
        home = _homes[device, ident, size]
        return home.pop(), home
    except (KeyError, IndexError):  # the stream's first call, or one while other threads have all of its addresses
        pass
    with _lock:
        key = device, ident, size
        if key in _homes or ident == _LEGACY_ID or len(_homes) < _MOST_HOMES:
            return _allocate(device, size), _homes.setdefault(key, [])
        return _Passing.take(stream, device, size)


class _Passing:
    """The home of an address on a stream that may be gone any time: back with an event recorded behind the call."""

    def __init__(self, event: Any, stream: int, addresses: deque[tuple[Any, int]]) -> None:
        self._event, self._stream, self._addresses = event, stream, addresses

    @classmethod
    def take(cls, stream: int, device: int, size: Size) -> tuple[int, _Passing]:
        """One of the addresses that have been back for longest, if its event has happened, or a new one."""
        addresses = _passing[device, size]
        with cupy().cuda.Device(device), driver.allowed_during_captures():
            for _ in range(min(len(addresses), 8)):  # one long launch must not keep all others from being found
                event, address = addresses.popleft()
                if event.done:
                    return address, cls(event, stream, addresses)
                addresses.append((event, address))
            return _allocate(device, size), cls(cupy().cuda.Event(disable_timing=True), stream, addresses)

    def append(self, address: int) -> None:
        cupy().cuda.runtime.eventRecord(self._event.ptr, self._stream)
        self._addresses.append((self._event, address))


def _for_graph(stream: int, device: int, size: Size) -> int:
    """An address for the graph that `stream` is captured into; those of destroyed graphs become idle."""
    with _lock:
        for owned in [g for g in _graphs if g.destroyed.is_set()]:
            _graphs.remove(owned)
            owned.destroyed.free()
            _idle[owned.device, owned.size].append(owned.address)
        address = _allocate(device, size)
        try:
            destroyed = driver.DestructionMark(stream)
        except BaseException:
            _idle[device, size].append(address)
            raise
        _graphs.append(_OfGraph(device, size, address, destroyed))
        return address


def _allocate(device: int, size: Size) -> int:
    """An idle address, or a new one."""
    runtime = cupy().cuda.runtime
    with cupy().cuda.Device(device), driver.allowed_during_captures():
        if _idle[device, size]:
            return _idle[device, size].pop()
        try:
            return _new(size)
        except runtime.CUDARuntimeError as error:
            if error.status != _OUT_OF_MEMORY:
                raise
        _free_what_libraries_cache()
        try:
            return _new(size)
        except runtime.CUDARuntimeError as error:
            raise MemoryError(
                f"prosparse_cupy: GPU {device} has no {_bytes(size)} bytes for an FFN's scratch: {error}"
            ) from error


def _bytes(size: Size) -> int:
    return size if isinstance(size, int) else TICKET_BYTES + size.behind


def _new(size: Size) -> int:
    """New memory of the current GPU; tickets are zero when this returns, for any stream."""
    runtime = cupy().cuda.runtime
    address = int(runtime.malloc(_bytes(size)))
    if isinstance(size, WithTickets):
        try:
            stream = cupy().cuda.Stream(non_blocking=True)
            runtime.memsetAsync(address, 0, TICKET_BYTES, stream.ptr)
            stream.synchronize()
        except BaseException:
            runtime.free(address)
            raise
    return address


def _free_what_libraries_cache() -> None:
    with suppress(RuntimeError):  # which they raise where a capture forbids it
        cupy().get_default_memory_pool().free_all_blocks()
    torch_cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if torch_cuda is not None:
        with suppress(RuntimeError):
            torch_cuda.empty_cache()
