"""The process that runs host-built kernels: reads pickled requests on stdin, answers with the output array on stdout."""

from __future__ import annotations

import ctypes
import pickle
import sys
from functools import cache
from typing import Any

import ml_dtypes  # noqa: F401  bfloat16 arrays need it to unpickle
import numpy as np

_TYPES = {"f": ctypes.c_float, "i": ctypes.c_int32}


@cache
def _library(path: str) -> ctypes.CDLL:
    library = ctypes.CDLL(path)
    library.host_alloc.restype = ctypes.c_void_p
    library.host_alloc.argtypes = [ctypes.c_size_t]
    library.host_free.argtypes = [ctypes.c_void_p]
    library.host_launch.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_uint64]
    return library


def run(
    path: str, grid: tuple, block: tuple, kinds: tuple[str, ...], values: list[Any], out: np.ndarray, seed: int
) -> np.ndarray:
    """Copy the arrays into buffers of exactly their size, launch, and copy `out` back; a weight's arrays come as a tuple.

    Arguments that are left out at the end are null, as biases are that a projection does not have.
    """
    library = _library(path)
    arguments, buffers, output = [], [], None

    def copied(value: np.ndarray) -> int:
        array = np.ascontiguousarray(value)
        buffers.append(library.host_alloc(array.nbytes))
        ctypes.memmove(buffers[-1], array.ctypes.data, array.nbytes)
        return buffers[-1]

    for kind, value in zip(kinds, [*values, *[0] * (len(kinds) - len(values))], strict=True):
        if kind in _TYPES:
            arguments.append(_TYPES[kind](value))
        elif isinstance(value, int):
            arguments.append(ctypes.c_void_p(value))
        elif isinstance(value, tuple):
            words = [v if isinstance(v, int) else copied(v) for v in value]
            arguments.append((ctypes.c_uint64 * len(kind))(*words))
        else:
            arguments.append(ctypes.c_void_p(copied(out if value is None else value)))
            output = buffers[-1] if value is None else output
    slots = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
    library.host_launch((ctypes.c_uint32 * 3)(*grid), (ctypes.c_uint32 * 3)(*block), slots, seed)
    result = np.empty_like(out)
    ctypes.memmove(result.ctypes.data, output, result.nbytes)
    for buffer in buffers:
        library.host_free(buffer)
    return result


def main() -> None:
    """Serve until stdin closes."""
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(run(*request), sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
