"""Runs the shipped `.cu` files on the host, under AddressSanitizer and UBSan, with the `Launch` records that a GPU would get.

`HostKernels.run` builds a kernel with the system C++ compiler and runs it in a worker process, so that a sanitizer's abort is
a failed test and not the end of pytest.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from prosparse_cupy.compiler import source
from prosparse_cupy.knobs import Define
from prosparse_cupy.launch import Launch

from .worker import Slot

_HERE = Path(__file__).resolve().parent
_COMPILER = shutil.which("g++")
_FLAGS = [
    "-std=c++17",
    "-O0",  # most kernels run for less time than they take to compile
    "-g1",
    "-fPIC",
    "-shared",
    "-nostdlib",  # what kernels call is in the scheduler's library, and in those that it is linked to
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-omit-frame-pointer",
    "-w",
    "-fsanitize=address,undefined",
    "-fsanitize-sections=shared_memory",
    "-fno-sanitize-recover=all",
]
_FLAGS_OF_SCHEDULER = ["-std=c++17", "-O2", "-fPIC", "-shared", "-Wl,--no-as-needed", "-lubsan", "-lm"]


class HostRunError(RuntimeError):
    """The kernel did not build, or a sanitizer or the shim ended the run; the message is its report."""


def why_unavailable() -> str:
    """Why kernels cannot run on this host; empty if they can."""
    if _COMPILER is None:
        return "no g++ on this machine: the kernels' host build needs a C++ compiler"
    if not Path(_runtime("libasan.so")).is_absolute():
        return "g++ has no AddressSanitizer runtime"
    return ""


def _runtime(library: str) -> str:
    return subprocess.run([_COMPILER, f"-print-file-name={library}"], capture_output=True, text=True, check=True).stdout.strip()


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


class HostKernels:
    """Built kernels and the worker that runs them.

    `builds` is a folder for the built kernels, which other processes may share at the same time.
    """

    def __init__(self, builds: Path | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="host_cuda_")
        self._builds = builds or Path(self._folder.name)
        self._worker: subprocess.Popen[bytes] | None = None
        self._log = Path(self._folder.name, "worker.log")
        self._lock = threading.Lock()

    def run(
        self, launch: Launch, inputs: list[np.ndarray | int | float], out: np.ndarray, *, seed: int = 0, code: str | None = None
    ) -> np.ndarray:
        """Launch a kernel and return what it left in `out`'s buffer, which starts as `out`.

        `inputs` are the kernel's arguments in order, with None where `out` goes, and a weight's arrays as a tuple; those that
        are left out at the end are null, as biases are that a projection does not have. `code` replaces the shipped source.
        """
        library = self.build(launch.kernel, source(launch.kernel) if code is None else code, launch.defines)
        buffers = [out]

        def part(kind: str, value: Any) -> bytes | tuple[int, int]:
            if kind in "fi":
                return struct.pack(f"{kind}4x", value)
            if isinstance(value, int):
                return value.to_bytes(8, "little")
            if value is None:
                return 0, 0
            buffers.append(np.ascontiguousarray(value))
            return len(buffers) - 1, 0

        given = [*inputs, *[0] * (len(launch.arguments) - len(inputs))]
        slots = []
        for kind, value in zip(launch.arguments, given, strict=True):
            values = value if isinstance(value, tuple) else (value,)
            slots.append(tuple(part(k, v) for k, v in zip(kind, values, strict=True)))
        changed = self.launch(library, launch.grid, launch.block, slots, [buffer.tobytes() for buffer in buffers], seed)
        return np.frombuffer(bytearray(changed.get(0, out.tobytes())), out.dtype).reshape(out.shape)

    def launch(
        self, library: Path, grid: tuple, block: tuple, slots: list[Slot], buffers: list[bytes], seed: int = 0
    ) -> dict[int, bytes]:
        """Launch a kernel on buffers, and return those that it has changed."""
        return self._ask("launch", str(self._scheduler), str(library), grid, block, slots, buffers, seed)

    def parameters(self, library: Path) -> tuple[str, ...]:
        """What a kernel takes, as `Launch.arguments` says it, but read off the compiled source."""
        return self._ask("parameters", str(self._scheduler), str(library))

    def _ask(self, *request: Any) -> Any:
        with self._lock:
            worker = self._start()
            try:
                pickle.dump(request, worker.stdin)
                worker.stdin.flush()
                return pickle.load(worker.stdout)
            except (EOFError, BrokenPipeError):
                worker.wait()
                self._worker = None
                raise HostRunError(self._log.read_text(errors="replace")) from None

    def close(self) -> None:
        """End the worker and remove what was built."""
        if self._worker is not None:
            self._worker.stdin.close()
            self._worker.wait()
        self._folder.cleanup()

    def _start(self) -> subprocess.Popen[bytes]:
        if self._worker is None:
            environment = {
                **os.environ,
                "LD_PRELOAD": _runtime("libasan.so"),
                "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
                "UBSAN_OPTIONS": "print_stacktrace=1",
            }
            with self._log.open("w") as log:
                self._worker = subprocess.Popen(
                    [sys.executable, str(_HERE / "worker.py")],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=environment,
                )
        return self._worker

    @cached_property
    def _scheduler(self) -> Path:
        """The library that the kernels call, and what they may call of the C library."""
        code = "".join((_HERE / name).read_text() for name in ("host_cuda.h", "scheduler.cpp"))
        library = self._builds / f"scheduler_{_digest(code, *_FLAGS_OF_SCHEDULER)}.so"
        if not library.exists():
            self._compile([str(_HERE / "scheduler.cpp"), *_FLAGS_OF_SCHEDULER], library)
        return library

    def _compile(self, options: list[str], out: Path, text: str | None = None) -> None:
        """Run the compiler; other processes see the whole result or none."""
        unfinished = out.with_name(f"{out.name}.{os.getpid()}")
        command = [_COMPILER, *options, "-o", str(unfinished)]
        built = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        if built.returncode:
            raise HostRunError(built.stderr)
        unfinished.replace(out)

    def build(self, kernel: str, code: str, defines: Iterable[Define]) -> Path:
        """The kernel as a library for `launch`."""
        # Shared arrays of templates have the section that is poisoned only if they belong to this file alone.
        text = f'#include "host_cuda.h"\nnamespace {{\n{code}\n}}\nHOST_ENTRY({kernel})\n'
        options = [f"-D{name}" if value is None else f"-D{name}={value}" for name, value in defines]
        header = (_HERE / "host_cuda.h").read_text()
        library = self._builds / f"{kernel}_{_digest(header, text, *_FLAGS, *options)}.so"
        if not library.exists():
            self._compile([*_FLAGS, *options, f"-I{_HERE}", "-xc++", "-"], library, text)
        return library
