"""Memory that GPUs of one host have of each other across processes, and the sums through it: ``kernels/all_reduce.cu``."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from .compiler import Kernel, loading, target_of
from .device import cupy
from .launch import Launch

_THREADS = 128
_BLOCKS = 8  # that a multiprocessor has room for at once, whatever else it does: each waits for the other GPUs'
_MOST_BLOCKS = 256
_MOST_RANKS = 8  # of one host
CAPACITY = _THREADS * _MOST_BLOCKS
"""Pairs of numbers that one launch can add up: eight tokens of 8192."""
SECONDS = 600
"""That a GPU waits for the others, as NCCL does unless told otherwise."""
_OPEN_LAZILY = 1  # cudaIpcMemLazyEnablePeerAccess, the only flag there is


def all_reduce_plan(ranks: int, numbers: int, programmatic: bool) -> Launch:
    """The launch that adds so many numbers of so many GPUs.

    Raises
    ------
    ValueError
        More GPUs or numbers than the kernel takes.
    """
    if not 2 <= ranks <= _MOST_RANKS:
        raise ValueError(f"all_reduce: {ranks} GPUs are not 2 to {_MOST_RANKS}")
    if not 0 < numbers <= 2 * CAPACITY:
        raise ValueError(f"all_reduce: {numbers} numbers are not 1 to {2 * CAPACITY}")
    defines = (("RANKS", ranks), ("THREADS", _THREADS), *((("PROGRAMMATIC", None),) if programmatic else ()))
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
    """Where a GPU's shared memory has what, in words of 64 bits: `offsets` first, then `exchanges`, then `mail`."""

    ranks: int
    capacity: int

    @property
    def exchanges(self) -> int:
        return self.ranks + self.ranks % 2  # vectors of 16 bytes

    @property
    def mail(self) -> int:
        return self.exchanges + -(-self.blocks // 4) * 2

    @property
    def words(self) -> int:
        return self.mail + 2 * self.ranks * self.capacity * 2

    @property
    def blocks(self) -> int:
        """That count their exchanges."""
        return -(-self.capacity // _THREADS)


class SharedMemory:
    """Zeros on this process's GPU, and the same of the other processes, which this one's GPU can write to.

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
        Where each process's lies, in bytes from this one's.

    Raises
    ------
    OSError
        In all processes, if any cannot see the others' memory; the message says which and why.
    """

    def __init__(self, number: int, nbytes: int, device: int, rank: int, tell: Callable[[Any], list[Any]]) -> None:
        runtime, problem = cupy().cuda.runtime, ""
        self.number, self.nbytes, self.device = number, nbytes, device
        self.address, self._opened = 0, list[int]()
        with cupy().cuda.Device(device):
            handle: Any = None
            try:
                self.address = int(runtime.malloc(nbytes))
                handle = bytes(runtime.ipcGetMemHandle(self.address))
            except runtime.CUDARuntimeError as error:
                problem = str(error)
            said = tell((_host(), problem, handle))
            addresses = [self.address] * len(said)
            if any(host != said[0][0] for host, *_ in said):
                problem = "the processes run on different hosts"
            elif not any(failure for _, failure, _ in said):
                try:
                    for other, (_, _, its) in enumerate(said):
                        if other != rank:
                            addresses[other] = int(runtime.ipcOpenMemHandle(its, _OPEN_LAZILY))
                            self._opened.append(addresses[other])
                except runtime.CUDARuntimeError as error:
                    problem = str(error)
            failures = [f"rank {r}: {failure}" for r, failure in enumerate(tell(problem)) if failure]
            if failures:
                self._close()
                raise OSError(f"GPUs do not see each other's memory ({failures[0]})")
            self.offsets = [address - self.address for address in addresses]
        self.clear(tell)

    def clear(self, tell: Callable[[Any], list[Any]]) -> None:
        """Zeros again, once no process uses it."""
        runtime = cupy().cuda.runtime
        with cupy().cuda.Device(self.device):
            runtime.deviceSynchronize()
            tell(None)  # all have read what they were sent
            runtime.memset(self.address, 0, self.nbytes)
            runtime.deviceSynchronize()
            tell(None)  # all can be sent something

    def words(self) -> Any:
        """This process's memory as a CuPy array of int64, which keeps it."""
        cuda = cupy().cuda
        memory = cuda.UnownedMemory(self.address, self.nbytes, self, self.device)
        return cupy().ndarray(self.nbytes // 8, "int64", cuda.MemoryPointer(memory, 0))

    def _close(self) -> None:
        """Give back what no other process has used."""
        runtime = cupy().cuda.runtime
        for address in self._opened:
            runtime.ipcCloseMemHandle(address)
        if self.address:
            runtime.free(self.address)


@cache
def _host() -> str:
    """What is the same in the processes of one host alone."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
