"""Scratch memory for what an FFN hands from its first launch to its second: one policy for every caller.

A call takes an address, launches both kernels, and gives the address back, without waiting for the GPU. What was used on a
stream is handed out on that stream alone, where the next call's launches follow the last one's, and to one call at a time, so
threads that share a stream do not share scratch. A captured call's address belongs to the graph until the driver has destroyed
the graph.

Streams are told apart by their ids, which are unique in a process. A handle is not: it is given out again as soon as its stream
is destroyed, while that stream's last launches may still run. The memory comes from cudaMalloc and not from an array library,
whose allocator would give it to others while a stream or a graph that it does not know still writes there.
"""

from __future__ import annotations

import sys
import threading
from collections import defaultdict
from typing import Any, NamedTuple

from . import _driver
from ._gpu import cupy

_LEGACY = (0, 1)  # handles of the legacy default stream, which is neither captured nor destroyed
_MOST_HOMES = 1024  # streams and sizes in use; at more, most of the streams must be gone, and the memory of all is collected
_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation


class _Scratch(NamedTuple):
    """A piece of memory."""

    device: int
    nbytes: int
    address: int


_left_over: list[_Scratch] = []
"""Of streams that were forgotten; launches there may not have ended."""
_collected: list[tuple[Any, list[_Scratch]]] = []
"""What was left over, with an event after which it is idle."""
_idle: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
"""Addresses that nothing uses, by device and size."""


class _Home(list[int]):
    """Free addresses of one stream. Once nobody can bring one back, they are left over."""

    def __init__(self, device: int, nbytes: int) -> None:
        self._key = device, nbytes

    def __del__(self, left_over: list[_Scratch] = _left_over) -> None:
        left_over.extend(_Scratch(*self._key, address) for address in self)


_homes: dict[tuple[int, int, int], _Home] = {}  # by device, stream id and size
_graphs: list[tuple[_Scratch, _driver.DestructionMark]] = []
_lock = threading.RLock()  # not for the single operations on `_homes` and its lists, which are atomic


def size_class(nbytes: int) -> int:
    """The size that is allocated for `nbytes`: one of few, so that what one shape leaves serves another."""
    return max(4096, 1 << (nbytes - 1).bit_length())


def take(stream: int, device: int, nbytes: int) -> tuple[int, list[int]]:
    """Scratch of `nbytes`, a `size_class`, for launches on `stream` (a `cudaStream_t`).

    Returns its address and the list to which the caller appends the address when its launches are made.
    """
    ident = -1
    if stream not in _LEGACY:
        if cupy().cuda.runtime.streamIsCapturing(stream):
            return _for_graph(stream, device, nbytes), []
        ident = _driver.stream_id(stream)
    try:
        home = _homes[device, ident, nbytes]
        return home.pop(), home
    except (KeyError, IndexError):  # the stream's first call, or one while other threads have all of its addresses
        pass
    with _lock:
        if len(_homes) >= _MOST_HOMES:
            _collect()
        return _allocate(device, nbytes), _homes.setdefault((device, ident, nbytes), _Home(device, nbytes))


def _for_graph(stream: int, device: int, nbytes: int) -> int:
    """An address for the graph that `stream` is captured into, and the addresses of destroyed graphs back to the idle ones."""
    with _lock:
        for owned in [g for g in _graphs if g[1].is_set()]:
            _graphs.remove(owned)
            owned[1].free()
            _idle[owned[0][:2]].append(owned[0].address)
        address = _allocate(device, nbytes)
        try:
            mark = _driver.DestructionMark(stream)
        except BaseException:
            _idle[device, nbytes].append(address)
            raise
        _graphs.append((_Scratch(device, nbytes, address), mark))
        return address


def _collect() -> None:
    """Forget all streams. What they had is idle once all that was launched until now has ended; this does not wait for it."""
    _homes.clear()
    taken = [_left_over.pop() for _ in range(len(_left_over))]
    for device in {scratch.device for scratch in taken}:
        own = [scratch for scratch in taken if scratch.device == device]
        event = _driver.event_after_everything(device)
        if event is None:
            _left_over.extend(own)
        else:
            _collected.append((event, own))


def _allocate(device: int, nbytes: int) -> int:
    """An idle address, or a new one."""
    runtime = cupy().cuda.runtime
    with cupy().cuda.Device(device), _driver.allowed_during_captures():
        for entry in [e for e in _collected if e[0].done]:
            _collected.remove(entry)
            for scratch in entry[1]:
                _idle[scratch[:2]].append(scratch.address)
        if _idle[device, nbytes]:
            return _idle[device, nbytes].pop()
        try:
            return runtime.malloc(nbytes)
        except runtime.CUDARuntimeError as error:
            if error.status != _OUT_OF_MEMORY:
                raise
        _free_what_libraries_cache()
        try:
            return runtime.malloc(nbytes)
        except runtime.CUDARuntimeError as error:
            raise MemoryError(
                f"prosparse_cupy: GPU {device} has no {nbytes} bytes left for an FFN's scratch: {error}"
            ) from error


def _free_what_libraries_cache() -> None:
    cupy().get_default_memory_pool().free_all_blocks()
    torch_cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if torch_cuda is not None:
        torch_cuda.empty_cache()
