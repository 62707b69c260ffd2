"""The array libraries: how to look at an array of each, make a new one, and find its caller's stream.

torch is looked up in `sys.modules` and never imported: whoever passes a tensor has imported it.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import ml_dtypes
import numpy as np

from ._gpu import cupy

HOST = -1  # device index of host memory

NUMPY_DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
_NUMPY_NAMES = {dtype: name for name, dtype in NUMPY_DTYPES.items()}
_CUDA_DLPACK_DEVICES = (2, 13)  # kDLCUDA, kDLCUDAManaged


class Family(ABC):
    """An array library. Compared and hashed by identity: one instance per library."""

    name: str
    is_foreign = False
    """Whether arrays pass through `bring_in` and `hand_out`."""
    allocator_knows_graphs = False
    """Whether memory allocated during a graph capture stays the graph's."""

    @abstractmethod
    def describe(self, array: Any) -> tuple[tuple[int, ...], str, int, bool]:
        """Shape, dtype name, device index and whether the array is C-contiguous."""

    @abstractmethod
    def address(self, array: Any) -> int:
        """Address of the first element."""

    def describe_all(self, arrays: Sequence[Any]) -> tuple[tuple[tuple[int, ...], str, int, bool], ...]:
        """`describe` of each: half of what a call costs the host, so the libraries in use have it in one expression."""
        return tuple([self.describe(a) for a in arrays])

    def addresses(self, arrays: Sequence[Any]) -> list[int]:
        """`address` of each."""
        return [self.address(a) for a in arrays]

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: str, device: int) -> Any:
        """A new array, from the library's own allocator."""

    def stream(self, device: int) -> int:
        """The caller's current stream on a GPU, as a `cudaStream_t`."""
        raise NotImplementedError(f"{self.name} has no streams")

    def bring_in(self, array: Any) -> Any:
        """The array as this family's `describe` and `address` know it; no copy."""
        return array

    def hand_out(self, array: Any, like: Any) -> Any:
        """A new result in the caller's own type; no copy."""
        return array


class _Numpy(Family):
    name = "NumPy"

    def describe(self, array: np.ndarray) -> tuple[tuple[int, ...], str, int, bool]:
        dtype = array.dtype
        return array.shape, _NUMPY_NAMES.get(dtype) or str(dtype), HOST, array.flags.c_contiguous

    def address(self, array: np.ndarray) -> int:
        return array.ctypes.data

    def empty(self, shape: tuple[int, ...], dtype: str, device: int) -> np.ndarray:
        return np.empty(shape, NUMPY_DTYPES[dtype])


class _Cupy(Family):
    name = "CuPy"

    def describe(self, array: Any) -> tuple[tuple[int, ...], str, int, bool]:
        dtype = array.dtype
        return array.shape, _NUMPY_NAMES.get(dtype) or str(dtype), array.data.device_id, array.flags.c_contiguous

    def describe_all(self, arrays: Sequence[Any]) -> tuple[tuple[tuple[int, ...], str, int, bool], ...]:
        name = _NUMPY_NAMES.get
        return tuple([(a.shape, name(a.dtype) or str(a.dtype), a.data.device_id, a.flags.c_contiguous) for a in arrays])

    def address(self, array: Any) -> int:
        return array.data.ptr

    def addresses(self, arrays: Sequence[Any]) -> list[int]:
        return [a.data.ptr for a in arrays]

    def empty(self, shape: tuple[int, ...], dtype: str, device: int) -> Any:
        with cupy().cuda.Device(device):
            return cupy().empty(shape, NUMPY_DTYPES[dtype])

    def stream(self, device: int) -> int:
        return cupy().cuda.get_current_stream(device).ptr


class _Torch(Family):
    name = "torch"
    allocator_knows_graphs = True

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._dtypes = {name: getattr(torch, name) for name in NUMPY_DTYPES}
        self._names = {dtype: name for name, dtype in self._dtypes.items()}
        if hasattr(torch._C, "_cuda_getCurrentRawStream"):  # absent from CPU builds; 0.1 µs where current_stream() takes 1
            self.stream = torch._C._cuda_getCurrentRawStream

    def describe(self, array: Any) -> tuple[tuple[int, ...], str, int, bool]:
        dtype = array.dtype
        return array.shape, self._names.get(dtype) or str(dtype), array.get_device(), array.is_contiguous()

    def describe_all(self, arrays: Sequence[Any]) -> tuple[tuple[tuple[int, ...], str, int, bool], ...]:
        name = self._names.get
        return tuple([(a.shape, name(a.dtype) or str(a.dtype), a.get_device(), a.is_contiguous()) for a in arrays])

    def address(self, array: Any) -> int:
        return array.data_ptr()

    def addresses(self, arrays: Sequence[Any]) -> list[int]:
        return [a.data_ptr() for a in arrays]

    def empty(self, shape: tuple[int, ...], dtype: str, device: int) -> Any:
        return self._torch.empty(shape, dtype=self._dtypes[dtype], device=self._torch.device("cuda", device))

    def stream(self, device: int) -> int:
        return self._torch.cuda.current_stream(device).cuda_stream


class _Dlpack(_Cupy):
    """Any other CUDA array, seen through a CuPy view of its memory."""

    is_foreign = True

    def __init__(self, kind: type) -> None:
        self.name = f"DLPack ({kind.__module__}.{kind.__qualname__})"

    def bring_in(self, array: Any) -> Any:
        if array.__dlpack_device__()[0] not in _CUDA_DLPACK_DEVICES:
            raise TypeError(
                f"prosparse_cupy: a {type(array).__name__} in host memory: move it to a GPU, or pass NumPy arrays, "
                "which run the reference"
            )
        return cupy().from_dlpack(array)

    def hand_out(self, array: Any, like: Any) -> Any:
        """Through the array API's `from_dlpack` where the caller's type names a namespace, else the CuPy array."""
        namespace = getattr(like, "__array_namespace__", None)
        return array if namespace is None else namespace().from_dlpack(array)


NUMPY = _Numpy()
CUPY = _Cupy()


@cache
def _torch_family(torch: Any) -> _Torch:
    return _Torch(torch)


@lru_cache(maxsize=256)
def family_of(kind: type) -> Family:
    """The family of an array type, or TypeError."""
    if issubclass(kind, np.ndarray):
        return NUMPY
    modules = sys.modules
    if "torch" in modules and issubclass(kind, modules["torch"].Tensor):
        return _torch_family(modules["torch"])
    if "cupy" in modules and issubclass(kind, modules["cupy"].ndarray):
        return CUPY
    if hasattr(kind, "__dlpack__") and hasattr(kind, "__dlpack_device__"):
        return _Dlpack(kind)
    raise TypeError(f"{kind.__module__}.{kind.__qualname__}")
