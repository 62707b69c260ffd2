"""The driver's launch call, with its arguments packed in one go, and programmatic where the GPU and the driver can.

CuPy's own launch knows no launch attributes, so cuLaunchKernelEx is called through ctypes; where the driver lacks it, launches
go through CuPy and wait for their predecessor's end as ever.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable
from functools import cache

from ._gpu import cupy
from .launch import Launch

_SLOT = 8  # bytes of one kernel argument
# CUlaunchConfig: grid, block and dynamic shared memory; then stream, attributes and their number.
_SHAPE, _REST = struct.Struct("7I4x"), "QQI4x"
_CONFIG_BYTES = _SHAPE.size + struct.calcsize(_REST)
# CUlaunchAttribute: id, and a union of 64 bytes at offset 8. CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION is 6.
_PROGRAMMATIC = ctypes.create_string_buffer(struct.pack("i4xi60x", 6, 1))

Launcher = Callable[..., None]


class _Buffer(threading.local):
    """A thread's room for one kernel's launches: the configuration, an argument in each slot, and pointers to the slots."""

    def __init__(self, shape: tuple[int, ...], arguments: int, device: int) -> None:
        cupy().cuda.runtime.setDevice(device)  # binds the GPU's primary context to a thread that has none yet
        self.bytes = ctypes.create_string_buffer(_CONFIG_BYTES + _SLOT * arguments)
        _SHAPE.pack_into(self.bytes, 0, *shape)
        self.config = ctypes.addressof(self.bytes)
        first = self.config + _CONFIG_BYTES
        self._slots = (ctypes.c_void_p * arguments)(*(first + _SLOT * i for i in range(arguments)))
        self.arguments = ctypes.addressof(self._slots)


def launcher(function: int, plan: Launch, device: int) -> Launcher:
    """A function that launches `function` (a CUfunction) as planned, with the GPU current: its stream, then the arguments."""
    shape = (*plan.grid, *plan.block, plan.shared_bytes)
    buffer = _Buffer(shape, len(plan.arguments), device)
    pack = struct.Struct(_REST + "".join(_slot(a) for a in plan.arguments)).pack_into
    start = _SHAPE.size
    extended = launch_kernel_ex() if plan.programmatic else None
    attribute = ctypes.addressof(_PROGRAMMATIC)

    def programmatic(stream: int, *arguments: int | float) -> None:
        pack(buffer.bytes, start, stream, attribute, 1, *arguments)
        status = extended(buffer.config, function, buffer.arguments, None)
        if status:
            raise cupy().cuda.driver.CUDADriverError(status)

    def plain(stream: int, *arguments: int | float) -> None:
        pack(buffer.bytes, start, stream, 0, 0, *arguments)
        cupy().cuda.driver.launchKernel(function, *shape, stream, buffer.arguments, 0)

    return plain if extended is None else programmatic


def _slot(argument: str) -> str:
    return argument + "x" * (_SLOT - struct.calcsize(argument))


@cache
def launch_kernel_ex() -> Callable[..., int] | None:
    """The driver's cuLaunchKernelEx (CUDA 11.8), or None where it cannot be found."""
    try:
        function = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p] * 4
    return function
