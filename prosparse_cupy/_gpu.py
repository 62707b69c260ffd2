"""The GPU side's front door: CuPy, imported when it is first needed, and the facts about a GPU that launches depend on."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import NamedTuple

MINIMUM_CAPABILITY = 80


class UnsupportedGPUError(RuntimeError):
    """The GPU is older than the kernels support."""


class NoGPUError(RuntimeError):
    """No CUDA GPU can be used."""


class Gpu(NamedTuple):
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
        return importlib.import_module("cupy")
    except ImportError as error:
        raise ImportError(
            "prosparse_cupy: GPU arrays need CuPy, which could not be imported "
            f'({error}). Install one of: pip install "prosparse-cupy[cuda12x]" (CUDA 12 driver) or '
            'pip install "prosparse-cupy[cuda13x]" (CUDA 13 driver). NumPy arrays, `reference` and `models` work without it.'
        ) from error


def current_device() -> int:
    """Index of CuPy's current GPU."""
    cuda = cupy().cuda
    try:
        if cuda.runtime.getDeviceCount() > 0:
            return cuda.runtime.getDevice()
        reason = "the driver reports no device"
    except cuda.runtime.CUDARuntimeError as error:
        reason = str(error)
    raise NoGPUError(
        f"prosparse_cupy: no CUDA GPU: looked for one through CuPy {cupy().__version__} and got: {reason}. NumPy arrays still "
        "work: they run `prosparse_cupy.reference` on the host. `prosparse-cupy doctor` shows what is missing."
    )


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
