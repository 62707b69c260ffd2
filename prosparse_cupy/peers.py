"""Memory that GPUs of one host have of each other across processes, and the sums through it: ``kernels/all_reduce.cu``."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .compiler import Kernel, loading, target_of
from .device import cupy
from .launch import Launch

_THREADS = 128
_BLOCKS = 8  # that an idle multiprocessor has room for at once: each waits for those of the other GPUs
_MOST_BLOCKS = 256
MOST_RANKS = 8
"""GPUs that the kernel adds up the numbers of."""
CAPACITY = _THREADS * _MOST_BLOCKS
"""Pairs of numbers that one launch can add up: eight tokens of 8192."""
SECONDS = 3600
"""That a GPU waits for the others, which may wait for whoever reads the text; a process that has ended never comes."""
_LINE = 16  # words of a line of a GPU's caches
_TO_DEVICE, _TO_HOST = 1, 2  # cudaMemcpyHostToDevice and back
_OPEN_LAZILY = 1  # cudaIpcMemLazyEnablePeerAccess, the only flag there is


def all_reduce_plan(ranks: int, numbers: int, programmatic: bool) -> Launch:
    """The launch that adds so many numbers of so many GPUs.

    Raises
    ------
    ValueError
        More GPUs or numbers than the kernel takes.
    """
    if not 2 <= ranks <= MOST_RANKS:
        raise ValueError(f"all_reduce: {ranks} GPUs are not 2 to {MOST_RANKS}")
    if not 0 < numbers <= 2 * CAPACITY:
        raise ValueError(f"all_reduce: {numbers} numbers are not 1 to {2 * CAPACITY}")
    defines = (
        ("RANKS", ranks),
        ("THREADS", _THREADS),
        ("MIN_BLOCKS", _BLOCKS),
        *((("PROGRAMMATIC", None),) if programmatic else ()),
    )
    grid = -(-numbers // (2 * _THREADS)), 1, 1
    return Launch("all_reduce", grid, (_THREADS, 1, 1), defines, (*5 * ("P",), *4 * ("i",)), programmatic=programmatic)


@cache
def all_reduce_kernel(ranks: int, numbers: int, device: int) -> Kernel:
    """The kernel on a GPU, compiled at the first call and kept."""
    with loading():
        return _load_once(ranks, numbers, device)


@cache
def _load_once(ranks: int, numbers: int, device: int) -> Kernel:
    return Kernel(all_reduce_plan(ranks, numbers, target_of(device).is_programmatic), device)


def capacity_of(numbers: int, multiprocessors: int) -> int:
    """Pairs that sums of up to so many numbers need, or as many as one launch takes on such a GPU."""
    return min(CAPACITY, _BLOCKS * _THREADS * multiprocessors, max(1, -(-numbers // 2)))


class Layout(NamedTuple):
    """Where a GPU's shared memory has what, in words of 64 bits: `offsets`, `given_up`, then `exchanges`, then `mail`."""

    ranks: int
    capacity: int

    @property
    def given_up(self) -> int:
        return self.ranks

    @property
    def exchanges(self) -> int:
        return -(-(self.ranks + 1) // _LINE) * _LINE

    @property
    def mail(self) -> int:
        return self.exchanges + -(-self.blocks // (2 * _LINE)) * _LINE

    @property
    def words(self) -> int:
        return self.mail + 2 * self.ranks * self.capacity * 2

    @property
    def blocks(self) -> int:
        """That count their exchanges."""
        return -(-self.capacity // _THREADS)


class SharedMemory:
    """Zeros on this process's GPU, and the same of the other processes, which this one's GPU can write to.

    It stays until the process ends: nobody knows when the others have closed it.

    Parameters
    ----------
    number : int
        Tells the memory from what the processes made before, the same in all of them.
    nbytes : int
        The same in all processes.
    device : int
        This process's GPU.
    rank : int
        Of this process.
    tell : callable
        Hands an object to all processes and returns what all said, in the order of their ranks; waits for all.

    Attributes
    ----------
    address : int
        Of this process's memory.
    offsets : list of int
        Where each process's lies, in bytes from this one's, and the word, which the host can write to, that ends waiting.

    Raises
    ------
    OSError
        In all processes, if any has no memory or cannot write to the others'; the message says which and why.
    """

    def __init__(self, number: int, nbytes: int, device: int, rank: int, tell: Callable[[Any], list[Any]]) -> None:
        self.number, self.nbytes, self.device = number, nbytes, device
        self.address, self._opened = 0, list[int]()
        with cupy().cuda.Device(device):
            problem, handle = self._allocate()
            said = tell((_host(), problem, handle))
            if any(host != said[0][0] for host, *_ in said):
                problem = "the processes run on different hosts"
            elif not any(failure for _, failure, _ in said):
                problem = self._open([its for *_, its in said], rank)
            problem = _first(tell(problem)) or _first(tell(self._why_not_reached(rank, len(said), tell)))
            if problem:
                self._close(tell)
                raise OSError(f"GPUs do not see each other's memory ({problem})")
            others = iter(self._opened)
            self.offsets = [0 if r == rank else next(others) - self.address for r in range(len(said))]
            self.offsets.append(self._page_locked.ptr - self.address)
        self.clear(tell)

    def _allocate(self) -> tuple[str, bytes]:
        """Why there is no memory for others, or nothing, and what they find it by."""
        runtime = cupy().cuda.runtime
        if os.environ.get("NCCL_P2P_DISABLE", "0") not in ("", "0"):
            return "NCCL_P2P_DISABLE is set", b""
        try:
            self.address = int(runtime.malloc(self.nbytes))
            self._zero()
            self._page_locked = cupy().cuda.alloc_pinned_memory(8)
            self._waits_no_more = np.frombuffer(self._page_locked, np.int64, 1)
            self._waits_no_more[0] = 0
            return "", bytes(runtime.ipcGetMemHandle(self.address))
        except (runtime.CUDARuntimeError, AttributeError) as error:  # a CuPy without them
            return str(error), b""

    def _open(self, handles: list[bytes], rank: int) -> str:
        """Why the others' memory cannot be opened, or nothing."""
        runtime = cupy().cuda.runtime
        try:
            for other, handle in enumerate(handles):
                if other != rank:
                    self._opened.append(int(runtime.ipcOpenMemHandle(handle, _OPEN_LAZILY)))
        except (runtime.CUDARuntimeError, AttributeError) as error:
            return str(error)
        return ""

    def _why_not_reached(self, rank: int, ranks: int, tell: Callable[[Any], list[Any]]) -> str:
        """Why what is written to the others' memory does not come there, or nothing: some hosts lose it."""
        runtime, problem = cupy().cuda.runtime, ""
        word = np.array([_mark(self.number, rank)], np.int64)
        try:
            for address in self._opened:
                runtime.memcpy(address + 8 * rank, word.ctypes.data, 8, _TO_DEVICE)
        except runtime.CUDARuntimeError as error:
            problem = str(error)
        tell(None)  # all have written
        if problem:
            return problem
        found = np.zeros(ranks, np.int64)
        runtime.memcpy(found.ctypes.data, self.address, found.nbytes, _TO_HOST)
        lost = [r for r in range(ranks) if r != rank and found[r] != _mark(self.number, r)]
        return f"what rank {lost[0]} writes does not arrive" if lost else ""

    def clear(self, tell: Callable[[Any], list[Any]]) -> None:
        """Zeros again. Nothing that this process has given its GPU may still use the memory."""
        tell(None)  # all have received what they were sent
        self._zero()
        tell(None)  # all can be sent something

    def give_up(self) -> None:
        """Have this process's GPU wait for the others no more: what it adds from now on means nothing.

        For any thread, while the GPU waits: no call of CUDA, since one that waits for the GPU may hold up all others.
        """
        self._waits_no_more[0] = 1

    def words(self) -> Any:
        """This process's memory as a CuPy array of int64, which keeps it."""
        cuda = cupy().cuda
        memory = cuda.UnownedMemory(self.address, self.nbytes, self, self.device)
        return cupy().ndarray(self.nbytes // 8, "int64", cuda.MemoryPointer(memory, 0))

    def _zero(self) -> None:
        """On a stream of its own, since other threads may be capturing on theirs."""
        with cupy().cuda.Device(self.device):
            stream = cupy().cuda.Stream(non_blocking=True)
            cupy().cuda.runtime.memsetAsync(self.address, 0, self.nbytes, stream.ptr)
            stream.synchronize()

    def _close(self, tell: Callable[[Any], list[Any]]) -> None:
        """Give all back, which all processes do."""
        runtime = cupy().cuda.runtime
        for address in self._opened:
            runtime.ipcCloseMemHandle(address)
        tell(None)  # all have closed it
        if self.address:
            runtime.free(self.address)


def _mark(number: int, rank: int) -> int:
    """What a process writes to the others' memory to see whether it comes there."""
    return (number << 8) + rank + 1


def _first(said: list[str]) -> str:
    """The first failure that the processes tell of, and whose it is, or nothing."""
    return next((f"rank {rank}: {failure}" for rank, failure in enumerate(said) if failure), "")


@cache
def _host() -> str:
    """What is the same in the processes of one host alone."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = ""
    return f"{platform.node()} {boot}"
