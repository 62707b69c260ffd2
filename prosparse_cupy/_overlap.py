"""Programmatic dependent launch: a kernel that may start before the one ahead of it on the stream has ended.

CuPy has no call for it, so this is `cuLaunchKernelEx` of the driver library through ctypes. The kernel itself waits for its
predecessor's results (`wait_for_previous` in `kernels/common.cuh`).
"""

from __future__ import annotations

import ctypes
import struct
from functools import cache

from ._gpu import cupy, gpu

_FIRST_DRIVER = 12030  # the first whose graph capture takes such launches
_FIRST_CAPABILITY = 90
_CONFIG = struct.Struct("7IPPI4x")  # CUlaunchConfig: grid, block, shared bytes, stream, attributes and their number
_PROGRAMMATIC_STREAM_SERIALIZATION = 6
_attribute = ctypes.create_string_buffer(struct.pack("I4xi60x", _PROGRAMMATIC_STREAM_SERIALIZATION, 1))  # CUlaunchAttribute


@cache
def is_supported(device: int) -> bool:
    """Whether this GPU and its driver take such launches."""
    try:
        _driver()
    except (OSError, AttributeError):
        return False
    return gpu(device).capability >= _FIRST_CAPABILITY and cupy().cuda.runtime.driverGetVersion() >= _FIRST_DRIVER


@cache
def _driver() -> ctypes._CFuncPtr:
    launch = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    launch.argtypes = [ctypes.c_void_p] * 4
    return launch


def launch_overlapped(function: int, shape: tuple[int, ...], stream: int, pointers: int) -> None:
    """Launch `function` (a `CUfunction`) with `shape` = (grid, block, shared bytes) and `pointers` to its arguments."""
    config = ctypes.create_string_buffer(_CONFIG.pack(*shape, stream, ctypes.addressof(_attribute), 1), _CONFIG.size)
    status = _driver()(ctypes.addressof(config), function, pointers, None)
    if status:
        raise RuntimeError(f"prosparse_cupy: cuLaunchKernelEx failed with CUDA driver error {status}")
