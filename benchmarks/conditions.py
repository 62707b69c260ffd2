"""The GPU that times are taken on: its yardsticks, its clock, and who else uses it."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from prosparse_cupy.device import cupy, current_device, gpu
from prosparse_cupy.testing import timing

from .results import Head

Rows = TypeVar("Rows")

_ROOT = Path(__file__).resolve().parent.parent
_READ_BYTES = 4 << 30
_LAUNCHES = 64
_READ = """
extern "C" __global__ void __launch_bounds__(512) read_all(const uint4* data, unsigned* out, long long vectors) {
    unsigned sum = 0;
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < vectors; i += 8 * step) {
        uint4 v[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) v[k] = i + k * step < vectors ? __ldcs(data + i + k * step) : uint4{0, 0, 0, 0};
#pragma unroll
        for (int k = 0; k < 8; ++k) sum += v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
    }
    if (sum == 1) *out = sum;  // so that nothing is optimised away
}
"""


@dataclass(frozen=True)
class Yardsticks:
    """What a floor is made of."""

    read_peak: float
    """Bytes a µs: the best of large reductions."""
    launch_us: float
    """An empty kernel in a graph of them, per call."""

    def floor_us(self, nbytes: int) -> float:
        return nbytes / self.read_peak + self.launch_us


def yardsticks(read_bytes: int = _READ_BYTES) -> Yardsticks:
    """Measure them on CuPy's current GPU."""
    cp = cupy()
    data, out = cp.zeros(read_bytes, cp.uint8), cp.zeros(1, cp.uint32)
    read = cp.RawKernel(_READ, "read_all")
    best = np.inf
    for blocks in (2, 4):
        shape = ((blocks * cp.cuda.runtime.getDeviceProperties(current_device())["multiProcessorCount"],), (512,))
        replay = timing.capture([lambda shape=shape: read(*shape, (data, out, np.int64(read_bytes // 16)))])
        best = min(best, float(np.median(timing.replay_times(replay, 1, repeats=10))))
    empty = cp.RawKernel('extern "C" __global__ void empty() {}', "empty")
    replay = timing.capture([lambda: empty((1,), (32,), ())] * _LAUNCHES)
    return Yardsticks(read_bytes / best, float(np.median(timing.replay_times(replay, _LAUNCHES))))


class Watch:
    """Looks at the GPU's clock and at its processes, through nvidia-smi, and remembers what should not be."""

    _LARGEST_DROP = 0.1

    def __init__(self) -> None:
        self.disturbances: list[str] = []
        self._fastest = 0.0

    def undisturbed(self, measure: Callable[[], Rows], during: str) -> Rows:
        """What `measure` returns; where something disturbs it, what it returns when called once more."""
        rows = measure()
        if self.look(during):
            rows = measure()
            self.look(f"{during}, measured again")
        return rows

    def look(self, during: str) -> bool:
        """Note a clock well below the fastest seen so far, and other processes on the GPU; whether there is either."""
        clock = _smi("--query-gpu=clocks.sm", "--format=csv,noheader,nounits")
        processes = _smi("--query-compute-apps=pid", "--format=csv,noheader")
        megahertz = float(clock[0]) if clock and clock[0].isdigit() else 0.0
        return self.note(during, megahertz, {int(p) for p in processes if p.isdigit()})

    def note(self, during: str, clock: float, processes: set[int]) -> bool:
        """`look`, on what was seen."""
        before = len(self.disturbances)
        if clock < (1 - self._LARGEST_DROP) * self._fastest:
            self.disturbances.append(f"{during}: the clock fell to {clock:.0f} MHz from {self._fastest:.0f}")
        self._fastest = max(self._fastest, clock)
        others = processes - {os.getpid()}
        if len(others) and len(processes) > 1:  # in a container our own process may go by another number
            self.disturbances.append(f"{during}: {len(processes) - 1} other process(es) on the GPU")
        return len(self.disturbances) > before


def prepare() -> tuple[Yardsticks, Watch]:
    """Yardsticks, and a watch that has seen the clock right after them."""
    measured, watch = yardsticks(), Watch()
    watch.look("at the start")
    return measured, watch


def _smi(*arguments: str) -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--id={current_device()}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=20).stdout.split()


def head(command: str, method: str, dense: str, measured: Yardsticks, watch: Watch) -> Head:
    """The head of a result."""
    cp = cupy()
    driver = _smi("--query-gpu=driver_version", "--format=csv,noheader")
    commit, clean = commit_of_checkout()
    return Head(
        command=command,
        gpu=gpu(current_device()).name,
        driver=driver[0] if driver else "unknown",
        cuda=_version(cp.cuda.runtime.runtimeGetVersion()),
        cupy=cp.__version__,
        torch=_torch(),
        dense=dense,
        commit=commit,
        clean=clean,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        method=method,
        read_peak_GBps=measured.read_peak * 1e-3,
        launch_us=measured.launch_us,
        disturbances=tuple(watch.disturbances),
    )


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _torch() -> str:
    if importlib.util.find_spec("torch") is None:
        return "not installed"
    return importlib.metadata.version("torch")


def commit_of_checkout() -> tuple[str, bool]:
    """The commit of this checkout and whether nothing is changed; whoever sets PROSPARSE_COMMIT vouches for both."""
    given = os.environ.get("PROSPARSE_COMMIT")
    if given:
        return given, True
    try:
        run = [
            subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=True).stdout.strip()
            for arguments in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown", False
    return run[0], not run[1]
