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
_MOST_ARGUMENTS = 16
# CUlaunchConfig: grid, block, dynamic shared memory; stream; attributes and their number.
_CONFIG = "7I4xQQI4x"
_CONFIG_BYTES = struct.calcsize(_CONFIG)
# CUlaunchAttribute: id, and a union of 64 bytes at offset 8. CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION is 6.
_PROGRAMMATIC = ctypes.create_string_buffer(struct.pack("i4xi60x", 6, 1))

Launcher = Callable[..., None]


class _Buffer:
    """One thread's room for a launch: the configuration, an argument in each slot, and pointers to the slots."""

    def __init__(self) -> None:
        self.bytes = ctypes.create_string_buffer(_CONFIG_BYTES + _SLOT * _MOST_ARGUMENTS)
        self.config = ctypes.addressof(self.bytes)
        first = self.config + _CONFIG_BYTES
        self._slots = (ctypes.c_void_p * _MOST_ARGUMENTS)(*(first + _SLOT * i for i in range(_MOST_ARGUMENTS)))
        self.arguments = ctypes.addressof(self._slots)


_local = threading.local()


def _buffer(device: int) -> _Buffer:
    try:
        return _local.buffers[device]
    except (AttributeError, KeyError):
        # A thread's first launch on a GPU: setDevice binds the GPU's primary context to the thread.
        cupy().cuda.runtime.setDevice(device)
        _local.__dict__.setdefault("buffers", {})[device] = _Buffer()
        return _local.buffers[device]


def launcher(function: int, plan: Launch, device: int) -> Launcher:
    """A function that launches `function` (a CUfunction) as planned: its stream, then the kernel's arguments."""
    pack = struct.Struct(_CONFIG + "".join(_slot(a) for a in plan.arguments)).pack_into
    shape = (*plan.grid, *plan.block, plan.shared_bytes)
    extended = launch_kernel_ex() if plan.programmatic else None
    if extended is None:
        return _plain_launcher(function, shape, pack, device)
    attribute = ctypes.addressof(_PROGRAMMATIC)

    def launch(stream: int, *arguments: int | float) -> None:
        buffer = _buffer(device)
        pack(buffer.bytes, 0, *shape, stream, attribute, 1, *arguments)
        status = extended(buffer.config, function, buffer.arguments, None)
        if status:
            raise cupy().cuda.driver.CUDADriverError(status)

    return launch


def _plain_launcher(function: int, shape: tuple[int, ...], pack: Callable[..., None], device: int) -> Launcher:
    launch_kernel = cupy().cuda.driver.launchKernel

    def launch(stream: int, *arguments: int | float) -> None:
        buffer = _buffer(device)
        pack(buffer.bytes, 0, *shape, stream, 0, 0, *arguments)
        launch_kernel(function, *shape, stream, buffer.arguments, 0)

    return launch


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
