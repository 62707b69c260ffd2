"""The array libraries: how to look at an array of each, make a new one, and find its caller's stream.

torch is looked up in `sys.modules` and never imported: whoever passes a tensor has imported it.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache, lru_cache
from types import ModuleType
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

import ml_dtypes
import numpy as np

from .device import cupy
from .driver import lasting_streams

HOST = -1  # device index of host memory


class Array(Protocol):
    """What the operators take: an array of CuPy, torch, NumPy, or another library with ``__dlpack__``."""

    @property
    def shape(self) -> Any: ...
    @property
    def dtype(self) -> Any: ...
    def __dlpack__(self, *arguments: Any, **keywords: Any) -> Any: ...


A = TypeVar("A", bound=Array)
"""The caller's type of array: a call takes and returns one."""

Description = tuple[tuple[int, ...], str, int, bool]
"""Shape, dtype name, device index (`HOST` where it is no GPU), and whether an array is C-contiguous."""

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

    @abstractmethod
    def describe(self, array: Any) -> Description:
        """What is known of an array but its address."""

    @abstractmethod
    def address(self, array: Any) -> int:
        """Address of the first element."""

    def describe_all(self, arrays: Sequence[Any]) -> tuple[Description, ...]:
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

    def why_no_memory(self, array: Any) -> str:
        """What an array is that has no address."""
        return "an array without memory"

    def bring_in(self, array: Any) -> Any:
        """The array as this family's `describe` and `address` know it; no copy."""
        return array

    def bring_out(self, array: Any) -> Any:
        """`bring_in` of an array that is written: ValueError where what is written would not be seen, or may not be."""
        return array

    def hand_out(self, array: Any, likes: Sequence[Any]) -> Any:
        """A new result in the type of the caller's arrays; no copy."""
        return array

    def numerics(self, like: Any) -> AbstractContextManager[Numerics]:
        """NumPy or CuPy for work beside an array, on its device and the caller's stream, and the way to see arrays with it."""
        raise NotImplementedError(f"{self.name} has no numerics")

    def empty_bfloat16(self, shape: tuple[int, ...], like: Any) -> Any:
        """A new bfloat16 array on the device of another one."""
        raise NotImplementedError(f"{self.name} has no numerics")

    def own(self, made: Any, like: Any) -> Any:
        """This library's own array of what `numerics` made: int32 as it is, and uint16 as the bits of bfloat16."""
        raise NotImplementedError(f"{self.name} has no numerics")


Numerics = tuple[ModuleType, Callable[[Any], Any]]
"""NumPy or CuPy, and a function that gives an array's memory as integers of that library; no copy."""


def _as_integers(array: Any) -> Any:
    return array.view(np.dtype(f"i{array.dtype.itemsize}"))


class _Numpy(Family):
    name = "NumPy"

    def describe(self, array: np.ndarray) -> Description:
        dtype = array.dtype
        return array.shape, _NUMPY_NAMES.get(dtype) or str(dtype), HOST, array.flags.c_contiguous

    def address(self, array: np.ndarray) -> int:
        return array.ctypes.data

    def empty(self, shape: tuple[int, ...], dtype: str, device: int) -> np.ndarray:
        return np.empty(shape, NUMPY_DTYPES[dtype])

    @contextmanager
    def numerics(self, like: np.ndarray) -> Iterator[Numerics]:
        yield np, _as_integers

    def empty_bfloat16(self, shape: tuple[int, ...], like: np.ndarray) -> np.ndarray:
        return np.empty(shape, NUMPY_DTYPES["bfloat16"])

    def own(self, made: Any, like: np.ndarray) -> Any:
        return made.view(NUMPY_DTYPES["bfloat16"]) if made.dtype == np.uint16 else made


class _Cupy(Family):
    name = "CuPy"

    def describe(self, array: Any) -> Description:
        dtype = array.dtype
        return array.shape, _NUMPY_NAMES.get(dtype) or str(dtype), array.data.device_id, array.flags.c_contiguous

    def describe_all(self, arrays: Sequence[Any]) -> tuple[Description, ...]:
        name = _NUMPY_NAMES.get
        return tuple([(a.shape, name(a.dtype) or str(a.dtype), a.data.device_id, a.flags.c_contiguous) for a in arrays])

    def address(self, array: Any) -> int:
        return int(array.data.ptr)

    def addresses(self, arrays: Sequence[Any]) -> list[int]:
        return [a.data.ptr for a in arrays]

    def empty(self, shape: tuple[int, ...], dtype: str, device: int) -> Any:
        with cupy().cuda.Device(device):
            return cupy().empty(shape, NUMPY_DTYPES[dtype])

    def stream(self, device: int) -> int:
        return int(cupy().cuda.get_current_stream(device).ptr)

    @contextmanager
    def numerics(self, like: Any) -> Iterator[Numerics]:
        with like.device:
            yield cupy(), _as_integers

    def empty_bfloat16(self, shape: tuple[int, ...], like: Any) -> Any:
        with like.device:
            return cupy().empty(shape, NUMPY_DTYPES["bfloat16"])

    def own(self, made: Any, like: Any) -> Any:
        return made.view(NUMPY_DTYPES["bfloat16"]) if made.dtype == np.uint16 else made


class _Torch(Family):
    name = "torch"

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._pool: Any = None
        self._dtypes = {name: getattr(torch, name) for name in NUMPY_DTYPES}
        self._names = {dtype: name for name, dtype in self._dtypes.items()}
        # 0.1 µs where current_stream() takes 1; absent from CPU builds.
        self._handle = getattr(torch._C, "_cuda_getCurrentRawStream", lambda i: torch.cuda.current_stream(i).cuda_stream)
        if torch.version.cuda is None:  # get_device() then counts devices of another kind
            self.describe_all = self._describe_all_off_gpu  # type: ignore[method-assign]

    def describe(self, array: Any) -> Description:
        return self.describe_all((array,))[0]

    def describe_all(self, arrays: Sequence[Any]) -> tuple[Description, ...]:
        name = self._names.get
        return tuple([(a.shape, name(a.dtype) or str(a.dtype), a.get_device(), a.is_contiguous()) for a in arrays])

    def _describe_all_off_gpu(self, arrays: Sequence[Any]) -> tuple[Description, ...]:
        name = self._names.get
        return tuple([(a.shape, name(a.dtype) or str(a.dtype), HOST, a.is_contiguous()) for a in arrays])

    def why_no_memory(self, array: Any) -> str:
        torch = self._torch
        if array.is_nested:
            return "a nested tensor"
        if array.layout is not torch.strided:
            return f"a tensor of layout {array.layout}"
        if torch._is_functional_tensor(array):
            return "a functional tensor"
        if torch._C._functorch.is_functorch_wrapped_tensor(array):
            return "a tensor inside a torch.func transform, such as vmap"
        return "a tensor without memory"

    def address(self, array: Any) -> int:
        return int(array.data_ptr())

    def addresses(self, arrays: Sequence[Any]) -> list[int]:
        return [a.data_ptr() for a in arrays]

    def empty(self, shape: tuple[int, ...], dtype: str, device: int) -> Any:
        return self._torch.empty(shape, dtype=self._dtypes[dtype], device=self._torch.device("cuda", device))

    def stream(self, device: int) -> int:
        handle: int = self._handle(device)
        # The ids of torch's own streams are odd, those of ExternalStreams even: torch keeps its own and never destroys one.
        if handle not in lasting_streams and self._torch.cuda.current_stream(device).stream_id & 1:
            lasting_streams.add(handle)
        return handle

    @contextmanager
    def numerics(self, like: Any) -> Iterator[Numerics]:
        if not like.is_cuda:
            yield np, lambda tensor: self._as_integers(tensor).numpy()
            return
        device = like.get_device()
        # A pool of its own, so that CuPy keeps no more of the GPU's memory than the temporaries of one call.
        self._pool = self._pool or cupy().cuda.MemoryPool()
        stream = cupy().cuda.Stream.from_external(_Stream(self.stream(device)))
        with cupy().cuda.Device(device), stream, cupy().cuda.using_allocator(self._pool.malloc):
            self._pool.free_all_blocks()
            yield cupy(), lambda tensor: cupy().from_dlpack(self._as_integers(tensor))

    def empty_bfloat16(self, shape: tuple[int, ...], like: Any) -> Any:
        return self._torch.empty(shape, dtype=self._torch.bfloat16, device=like.device)

    def own(self, made: Any, like: Any) -> Any:
        torch = self._torch
        integers = torch.int16 if made.dtype == np.uint16 else torch.int32
        owned = torch.empty(made.shape, dtype=integers, device=like.device)  # so that torch's allocator has it, not CuPy's
        seen = cupy().from_dlpack(owned) if owned.is_cuda else owned.numpy()
        seen[...] = made.view(seen.dtype)
        return owned.view(torch.bfloat16) if integers is torch.int16 else owned

    def _as_integers(self, tensor: Any) -> Any:
        torch = self._torch
        return tensor.detach().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


class _Stream:
    """A stream as CuPy takes it from others."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


class _Dlpack(_Cupy):
    """Any other CUDA array, seen through a CuPy view of its memory; CuPy's own may stand beside it."""

    is_foreign = True

    def __init__(self, kind: type) -> None:
        self.name = f"DLPack ({kind.__module__}.{kind.__qualname__})"

    def bring_in(self, array: Any) -> Any:
        if isinstance(array, cupy().ndarray):
            return array
        if array.__dlpack_device__()[0] not in _CUDA_DLPACK_DEVICES:
            raise TypeError(
                f"prosparse_cupy: a {type(array).__name__} in host memory: move it to a GPU, or pass NumPy arrays, "
                "which run the reference"
            )
        return cupy().from_dlpack(array)

    def bring_out(self, array: Any) -> Any:
        view = self.bring_in(array)
        if view is array:
            return view
        capsule = _export(array)
        flags = _dlpack_flags(capsule)
        if flags & _READ_ONLY:
            raise ValueError(f"a read-only {type(array).__name__}: pass an array that may be written")
        # An exporter need not say that it copies. Two copies that are there at the same time have different addresses.
        if flags & _IS_COPIED or cupy().from_dlpack(capsule).data.ptr != view.data.ptr:
            raise ValueError(
                f"a {type(array).__name__} that exports a copy of its memory, so a result would be lost: pass an array that "
                "exports its memory itself"
            )
        return view

    def hand_out(self, array: Any, likes: Sequence[Any]) -> Any:
        """Through the array API's `from_dlpack` where the caller's type names a namespace, else the CuPy array."""
        foreign = next(a for a in likes if hasattr(a, "__dlpack__") and not isinstance(a, cupy().ndarray))
        namespace = getattr(foreign, "__array_namespace__", None)
        return array if namespace is None else namespace().from_dlpack(array)


_READ_ONLY, _IS_COPIED = 1, 2  # bits of DLPACK_FLAG_BITMASK


def _export(array: Any) -> Any:
    """A DLPack capsule for CuPy's current stream, with flags (DLPack 1.0) where the exporter has them."""
    stream = cupy().cuda.get_current_stream().ptr or 1  # 1: the legacy default stream
    try:
        return array.__dlpack__(stream=stream, max_version=(1, 0))
    except TypeError:
        return array.__dlpack__(stream=stream)


def _dlpack_flags(capsule: Any) -> int:
    """The flags of a DLManagedTensorVersioned; 0 of an older DLManagedTensor."""
    api = ctypes.pythonapi
    api.PyCapsule_IsValid.argtypes, name = [ctypes.py_object, ctypes.c_char_p], b"dltensor_versioned"
    if not api.PyCapsule_IsValid(capsule, name):
        return 0
    api.PyCapsule_GetPointer.argtypes, api.PyCapsule_GetPointer.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
    # After the version (two 32-bit integers), the manager's context and its deleter (pointers).
    return ctypes.c_uint64.from_address(api.PyCapsule_GetPointer(capsule, name) + 8 + 2 * ctypes.sizeof(ctypes.c_void_p)).value


NUMPY = _Numpy()
CUPY = _Cupy()
_dlpack_families: WeakKeyDictionary[type, _Dlpack] = WeakKeyDictionary()
_lock = threading.RLock()


@cache
def _torch_family(torch: Any) -> _Torch:
    return _Torch(torch)


@lru_cache(maxsize=256)
def family_of(kind: type) -> Family:
    """The family of an array type, or TypeError."""
    if issubclass(kind, np.ndarray):
        if issubclass(kind, (np.matrix, np.ma.MaskedArray)):
            raise TypeError(
                f"{kind.__module__}.{kind.__qualname__}, which computes in its own way: pass the array that it holds"
            )
        return NUMPY
    torch, loaded_cupy = (sys.modules.get(name) for name in ("torch", "cupy"))
    if issubclass(kind, getattr(torch, "Tensor", ())):
        _refuse_tensors_without_memory(torch, kind)
        with _lock:  # so that threads that make the first call agree on it
            return _torch_family(torch)
    if issubclass(kind, getattr(loaded_cupy, "ndarray", ())):
        return CUPY
    if hasattr(kind, "__dlpack__") and hasattr(kind, "__dlpack_device__"):
        with _lock:
            return _dlpack_families.setdefault(kind, _Dlpack(kind))
    raise TypeError(f"{kind.__module__}.{kind.__qualname__}")


def family_of_all(kinds: set[type]) -> Family | None:
    """The family of arrays of these types, or None if they have several. CuPy arrays go with DLPack objects of one type."""
    families = {family_of(kind) for kind in kinds}
    if len(families) == 2 and CUPY in families:
        families.discard(CUPY)
        return next((f for f in families if f.is_foreign), None)
    return families.pop() if len(families) == 1 else None


def _refuse_tensors_without_memory(torch: Any, kind: Any) -> None:
    """TypeError for tensor subclasses whose data only their own code knows (DTensor, FakeTensor, ...), or that have none."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise TypeError(f"{name}, a tensor subclass that is not plain memory: pass the plain tensors that it holds")
    if issubclass(kind, torch.nn.parameter.UninitializedTensorMixin):
        raise TypeError(f"{name}, which has no memory yet: initialise it first")
