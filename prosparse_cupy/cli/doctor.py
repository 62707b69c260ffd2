"""What this environment has, and what is wrong with it: facts first, then a pure diagnosis of them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__, measured
from ..device import MINIMUM_CAPABILITY, cache_folder, import_cupy
from ..problem import Target

_CUPY_WHEELS = ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x", "amd-cupy")
_FIRST_NVRTC = {
    100: (12, 8),
    101: (12, 8),
    103: (12, 9),
    120: (12, 8),
    121: (12, 9),
}  # by capability; older ones need 11.8 at most
Version = tuple[int, int]


@dataclass(frozen=True)
class GpuFact:
    """One GPU."""

    name: str
    capability: int
    measured: str = ""
    """Of its launches, how many are measured."""


@dataclass(frozen=True)
class Facts:
    """The environment."""

    version: str = __version__
    """Of prosparse-cupy."""
    python: str = ""
    system: str = ""
    cupy_wheels: dict[str, str] = field(default_factory=dict)
    """Distribution name to version."""
    cupy_error: str = ""
    """Why CuPy cannot be imported."""
    nvrtc: Version | None = None
    nvrtc_path: str = ""
    nvrtc_error: str = ""
    headers: Version | None = None
    headers_path: str = ""
    runtime: Version | None = None
    """The CUDA runtime that CuPy is built with."""
    driver: Version | None = None
    """The newest CUDA that the driver supports."""
    gpus: tuple[GpuFact, ...] = ()
    gpu_error: str = ""
    cache: str = ""
    cache_error: str = ""
    torch: str = ""
    torch_cuda: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Problem:
    """Something broken, and the command that fixes it."""

    what: str
    fix: str


def collect() -> Facts:
    """Look at the environment. Never raises for what it finds missing."""
    facts: dict[str, Any] = {"python": platform.python_version(), "system": platform.platform()}
    facts |= {"cupy_wheels": _wheels(), **_cache(), **_torch()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the cache's folder is a finding of its own
            cupy = import_cupy()
    except Exception as error:  # a broken CuPy fails in many ways; each is a finding
        return Facts(**facts, cupy_error=f"{type(error).__name__}: {error}")
    facts |= _compiler(cupy) | _headers() | _gpus(cupy)
    facts["runtime"] = _version(cupy.cuda.runtime.runtimeGetVersion())
    return Facts(**facts)


def diagnose(facts: Facts) -> list[Problem]:
    """Everything known to be wrong with such an environment."""
    checks: tuple[Callable[[Facts], Problem | None], ...] = (_cupy, _driver, _nvrtc, _cuda_headers, _capability, _cache_folder)
    return [problem for check in checks if (problem := check(facts)) is not None]


def _cuda_extra(facts: Facts) -> str:
    """The extra for the driver, and beside a torch for CUDA 12 or 13, which the driver supports, that of torch."""
    driver, torch = facts.driver[0] if facts.driver else None, int(facts.torch_cuda.split(".")[0]) if facts.torch_cuda else None
    major = torch if torch is not None and (driver is None or torch <= driver) else driver
    return "cuda13x" if major is not None and major >= 13 else "cuda12x"


def _toolkit(facts: Facts) -> str:
    major = facts.runtime[0] if facts.runtime else 12
    return f'pip install "cuda-toolkit[cudart,nvrtc]=={major}.*"'


def _cupy(facts: Facts) -> Problem | None:
    install = f'pip install "prosparse-cupy[{_cuda_extra(facts)}]"'
    if len(facts.cupy_wheels) > 1:
        names = " ".join(sorted(facts.cupy_wheels))
        return Problem(f"two CuPy wheels overwrite each other's files: {names}", f"pip uninstall -y {names} && {install}")
    if not facts.cupy_wheels:
        return Problem("CuPy is not installed: NumPy arrays only", install)
    if facts.cupy_error:
        return Problem(
            f"CuPy cannot be imported: {facts.cupy_error}", f"pip install --force-reinstall {next(iter(facts.cupy_wheels))}"
        )
    return None


def _driver(facts: Facts) -> Problem | None:
    if facts.cupy_error or not facts.cupy_wheels:
        return None
    if not facts.gpus:
        reason = facts.gpu_error or "the driver reports no device"
        return Problem(
            f"no CUDA GPU: {reason}: NumPy arrays only", "nvidia-smi  # must list a GPU: install or update NVIDIA's driver"
        )
    if facts.driver and facts.runtime and facts.runtime[0] > facts.driver[0]:
        wheels = " ".join(facts.cupy_wheels)
        return Problem(
            f"CuPy is built for CUDA {_dotted(facts.runtime)}, the driver supports {_dotted(facts.driver)}",
            f'pip uninstall -y {wheels} && pip install "prosparse-cupy[{_cuda_extra(facts)}]"  # or update the driver',
        )
    return None


def _nvrtc(facts: Facts) -> Problem | None:
    if facts.cupy_error or not facts.cupy_wheels:
        return None
    if facts.nvrtc is None:
        return Problem(f"NVRTC, the run-time compiler, is missing: {facts.nvrtc_error}", _toolkit(facts))
    if facts.driver and facts.nvrtc[0] > facts.driver[0]:
        major, ours, theirs = facts.driver[0], _dotted(facts.nvrtc), _dotted(facts.driver)
        fix = f'pip install --force-reinstall "cuda-toolkit[cudart,nvrtc]=={major}.*"'
        if facts.torch_cuda and int(facts.torch_cuda.split(".")[0]) > major:  # its wheels bring the NVRTC that CuPy then finds
            fix = f"pip uninstall -y torch nvidia-cuda-nvrtc && {fix}  # and a torch for CUDA {major}, or a newer driver"
        return Problem(f"NVRTC {ours} is newer than the driver's CUDA {theirs}: the driver rejects its output", fix)
    for gpu in facts.gpus:
        if facts.nvrtc < _FIRST_NVRTC.get(gpu.capability, (0, 0)):
            return Problem(f"NVRTC {_dotted(facts.nvrtc)} does not know {gpu.name} (sm_{gpu.capability})", _toolkit(facts))
    return None


def _cuda_headers(facts: Facts) -> Problem | None:
    if facts.cupy_error or not facts.cupy_wheels or facts.headers_path:
        return None
    return Problem("the CUDA headers, which CuPy compiles with, are missing", _toolkit(facts))


def _capability(facts: Facts) -> Problem | None:
    old = [gpu for gpu in facts.gpus if gpu.capability < MINIMUM_CAPABILITY]
    if not old or len(old) < len(facts.gpus):
        return None
    found = ", ".join(f"{gpu.name} (sm_{gpu.capability})" for gpu in old)
    return Problem(f"no GPU of compute capability 8.0 or later: {found}", "use an Ampere (A100, RTX 30) or later GPU")


def _cache_folder(facts: Facts) -> Problem | None:
    if not facts.cache_error:
        return None
    return Problem(
        f"the kernel cache {facts.cache} is not writable ({facts.cache_error}): every process compiles again",
        'export CUPY_CACHE_DIR="$HOME/.cupy/kernel_cache"  # or another writable folder',
    )


def _wheels() -> dict[str, str]:
    found = {}
    for name in _CUPY_WHEELS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cache() -> dict[str, str]:
    folder, why_not = cache_folder()
    return {"cache": str(folder), "cache_error": why_not}


def _torch() -> dict[str, str]:
    """Of torch's own files: importing it takes seconds and may initialise CUDA."""
    try:
        spec = importlib.util.find_spec("torch")
    except ValueError:  # half imported
        return {}
    if spec is None or spec.origin is None:
        return {}
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return {"torch": importlib.metadata.version("torch")}
    version, cuda = (re.search(rf"^{name}\b.*= *'(.*?)'", text, re.MULTILINE) for name in ("__version__", "cuda"))
    return {"torch": version.group(1) if version else "unknown", "torch_cuda": cuda.group(1) if cuda else ""}


def _compiler(cupy: Any) -> dict[str, Any]:
    try:
        version = tuple(cupy.cuda.nvrtc.getVersion())
    except Exception as error:  # pathfinder's and CuPy's own errors share no base
        return {"nvrtc_error": str(error).splitlines()[0]}
    return {"nvrtc": version, "nvrtc_path": _loaded_library("libnvrtc.so")}


def _loaded_library(name: str) -> str:
    """Path of a loaded shared library, from the process's own map."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return ""
    return next((line.split()[-1] for line in maps.splitlines() if f"/{name}" in line), "")


def _headers() -> dict[str, Any]:
    from cuda.pathfinder import locate_nvidia_header_directory

    located = locate_nvidia_header_directory("cudart")
    if located is None or located.abs_path is None:
        return {}
    folder = Path(located.abs_path)
    text = (folder / "cuda.h").read_text(encoding="utf-8", errors="replace") if (folder / "cuda.h").is_file() else ""
    number = re.search(r"#define CUDA_VERSION (\d+)", text)
    return {"headers_path": str(folder), "headers": _version(int(number.group(1))) if number else None}


def _gpus(cupy: Any) -> dict[str, Any]:
    runtime = cupy.cuda.runtime
    try:
        driver = runtime.driverGetVersion()
        every = [runtime.getDeviceProperties(i) for i in range(runtime.getDeviceCount())]
    except runtime.CUDARuntimeError as error:
        return {"gpu_error": str(error)}
    gpus = tuple(_gpu_fact(p) for p in every)
    return {"driver": _version(driver), "gpus": gpus}


def _gpu_fact(properties: dict[str, Any]) -> GpuFact:
    name, capability = properties["name"].decode(), properties["major"] * 10 + properties["minor"]
    return GpuFact(name, capability, measured.describe(Target(capability, properties["multiProcessorCount"], name)))


def _version(number: int) -> Version | None:
    """CUDA's 12090 as (12, 9)."""
    return (number // 1000, number % 1000 // 10) if number else None


def _dotted(version: Version | None) -> str:
    return ".".join(map(str, version)) if version else "none"


def describe(facts: Facts) -> list[tuple[str, str]]:
    """The facts as lines of a table."""
    wheels = ", ".join(f"{name} {version}" for name, version in facts.cupy_wheels.items())
    gpus = ", ".join(f"{gpu.name} (sm_{gpu.capability})" for gpu in facts.gpus)
    torch = facts.torch and f"{facts.torch}, CUDA {facts.torch_cuda or 'none'}"
    return [
        ("prosparse-cupy", facts.version),
        ("Python", facts.python),
        ("system", facts.system),
        ("CuPy", wheels or "not installed"),
        ("CUDA runtime of CuPy", _dotted(facts.runtime)),
        ("NVRTC", f"{_dotted(facts.nvrtc)} {facts.nvrtc_path or facts.nvrtc_error}".strip()),
        ("CUDA headers", f"{_dotted(facts.headers)} {facts.headers_path}".strip()),
        ("driver", f"up to CUDA {_dotted(facts.driver)}" if facts.driver else "none"),
        ("GPUs", gpus or facts.gpu_error or "none"),
        *((f"measured launches, GPU {i}", gpu.measured) for i, gpu in enumerate(facts.gpus) if gpu.measured),
        ("kernel cache", facts.cache + (f" ({facts.cache_error})" if facts.cache_error else ", writable")),
        ("torch", torch or "not installed"),
    ]
