"""The GPU side's front door: CuPy, imported when it is first needed, and the facts about a GPU that launches depend on."""

from __future__ import annotations

import atexit
import importlib
import os
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

MINIMUM_CAPABILITY = 80


class UnsupportedGPUError(RuntimeError):
    """The GPU is older than the kernels support."""


class NoGPUError(RuntimeError):
    """No CUDA GPU can be used."""


@dataclass(frozen=True)
class Gpu:
    """A GPU as launches see it."""

    index: int
    name: str
    capability: int
    """Compute capability as major * 10 + minor: 90 for an H100."""
    multiprocessors: int


@cache
def cupy() -> ModuleType:
    """CuPy, or an ImportError that says which extra brings it."""
    try:
        return import_cupy()
    except ImportError as error:
        raise ImportError(
            "prosparse_cupy: GPU arrays need CuPy, which could not be imported "
            f'({error}). Install one of: pip install "prosparse-cupy[cuda12x]" (CUDA 12 driver) or '
            'pip install "prosparse-cupy[cuda13x]" (CUDA 13 driver). NumPy arrays, `reference` and `models` work without it.'
        ) from error


def import_cupy() -> ModuleType:
    """CuPy, also where the folder of its kernel cache cannot be made or written."""
    folder, why_not = cache_folder()
    if not why_not:
        return importlib.import_module("cupy")
    if os.environ.get("CUPY_CACHE_IN_MEMORY", "0") == "0":
        compile_without_cache(f"{folder} cannot be written ({why_not})")
    before = os.environ.get("CUPY_CACHE_DIR")
    os.environ["CUPY_CACHE_DIR"] = _some_folder()  # CuPy makes the folder when it is imported, unless there is one
    try:
        return importlib.import_module("cupy")
    finally:
        if before is None:
            del os.environ["CUPY_CACHE_DIR"]
        else:
            os.environ["CUPY_CACHE_DIR"] = before


@cache
def _some_folder() -> str:
    """One that is there, and of this process alone if there can be such a one."""
    try:
        folder = tempfile.mkdtemp(prefix="prosparse-cupy-")
    except OSError:
        return os.sep
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def cache_folder() -> tuple[Path, str]:
    """Where CuPy keeps compiled kernels, and why it cannot, or nothing."""
    # `os.path.expanduser`, as CuPy has it, also takes a user without a home, where Path's raises.
    folder = Path(os.environ.get("CUPY_CACHE_DIR", os.path.expanduser("~/.cupy/kernel_cache")))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder, ""
    except OSError as error:
        return folder, error.strerror or str(error)


def compile_without_cache(reason: str) -> None:
    """Let CuPy compile without its cache on disk from now on, and warn."""
    os.environ["CUPY_CACHE_IN_MEMORY"] = "1"
    warnings.warn(
        f"prosparse_cupy: CuPy's kernel cache {reason}: every process compiles its kernels again. Set CUPY_CACHE_DIR to a "
        "folder that can be written.",
        RuntimeWarning,
        stacklevel=2,
    )


def current_device() -> int:
    """Index of CuPy's current GPU."""
    cuda = cupy().cuda
    try:
        if cuda.runtime.getDeviceCount() > 0:
            return int(cuda.runtime.getDevice())
        reason = "the driver reports no device"
    except cuda.runtime.CUDARuntimeError as error:
        reason = str(error)
    raise NoGPUError(
        f"prosparse_cupy: no CUDA GPU: looked for one through CuPy {cupy().__version__} and got: {reason}. NumPy arrays still "
        "work: they run `prosparse_cupy.reference` on the host. `prosparse-cupy doctor` shows what is missing."
    )


def has_gpu() -> bool:
    """Whether there is a GPU that CuPy can use."""
    try:
        current_device()
    except (ImportError, NoGPUError):
        return False
    return True


@cache
def gpu(index: int) -> Gpu:
    """The GPU with this index, refused if the kernels do not support it."""
    properties = cupy().cuda.runtime.getDeviceProperties(index)
    name = properties["name"].decode()
    capability = properties["major"] * 10 + properties["minor"]
    if capability < MINIMUM_CAPABILITY:
        raise UnsupportedGPUError(
            f"prosparse_cupy: GPU {index}, {name}, has compute capability {capability / 10}; "
            f"the kernels need {MINIMUM_CAPABILITY / 10} (Ampere: A100, RTX 30) or later."
        )
    return Gpu(index, name, capability, properties["multiProcessorCount"])
