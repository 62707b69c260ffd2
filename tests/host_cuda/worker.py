"""The process that runs host-built kernels: reads pickled requests on stdin, answers on stdout."""

from __future__ import annotations

import ctypes
import pickle
import sys
from functools import cache

Slot = tuple["bytes | tuple[int, int]", ...]
"""A kernel's argument in parts of 8 bytes: as they are, or the address at an offset into one of the buffers."""


@cache
def _scheduler(path: str) -> ctypes.CDLL:
    scheduler = ctypes.CDLL(path, ctypes.RTLD_GLOBAL)  # for the kernels, which call it
    scheduler.host_alloc.restype = ctypes.c_void_p
    scheduler.host_alloc.argtypes = [ctypes.c_size_t]
    scheduler.host_free.argtypes = [ctypes.c_void_p]
    scheduler.host_launch.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_uint64]
    scheduler.host_parameters.restype = ctypes.c_char_p
    scheduler.host_parameters.argtypes = [ctypes.c_void_p]
    return scheduler


@cache
def _kernel(path: str) -> int:
    """The address of what the scheduler gets of a kernel."""
    return ctypes.addressof(ctypes.c_char.in_dll(ctypes.CDLL(path), "host_kernel"))


def parameters(scheduler: str, path: str) -> tuple[str, ...]:
    """What the kernel takes, as `Launch.arguments` says it."""
    library = _scheduler(scheduler)
    return tuple(library.host_parameters(_kernel(path)).decode().split())


def launch(
    scheduler: str, path: str, grid: tuple, block: tuple, slots: list[Slot], buffers: list[bytes], seed: int
) -> dict[int, bytes]:
    """Copy the buffers into memory of exactly their size, launch, and return those that the kernel has changed."""
    library = _scheduler(scheduler)
    memory = []
    for buffer in buffers:
        memory.append(library.host_alloc(len(buffer)))
        ctypes.memmove(memory[-1], buffer, len(buffer))

    def word(part: bytes | tuple[int, int]) -> bytes:
        return part if isinstance(part, bytes) else (memory[part[0]] + part[1]).to_bytes(8, "little")

    words = [ctypes.create_string_buffer(b"".join(map(word, slot))) for slot in slots]
    arguments = (ctypes.c_void_p * len(words))(*map(ctypes.addressof, words))
    library.host_launch(_kernel(path), (ctypes.c_uint32 * 3)(*grid), (ctypes.c_uint32 * 3)(*block), arguments, seed)
    after = [ctypes.string_at(address, len(buffer)) for address, buffer in zip(memory, buffers, strict=True)]
    for address in memory:
        library.host_free(address)
    return {i: now for i, (now, before) in enumerate(zip(after, buffers, strict=True)) if now != before}


def main() -> None:
    """Serve until stdin closes."""
    while True:
        try:
            function, *arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump({"parameters": parameters, "launch": launch}[function](*arguments), sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
