"""From a `.cu` file to a kernel that can be launched: source, NVRTC through `cupy.RawModule`, and a cache per GPU."""

from __future__ import annotations

import os
import re
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar
from weakref import WeakSet

from . import launch
from .device import NoGPUError, compile_without_cache, cupy, gpu
from .driver import Launcher, launcher
from .formats import Format
from .formula import RELU
from .knobs import Knobs
from .problem import KERNELS, Problem, Target
from .tensor_cores import FEWEST_OF_GATE, keeps_bits, knobs_on_tensor_cores

_PACKAGE = Path(__file__).resolve().parent
_INCLUDE = re.compile(r'^#include "(?P<file>\w+\.cuh)"\n', re.MULTILINE)


class KernelCompileError(RuntimeError):
    """A kernel could not be compiled or loaded; the message carries kernel, architecture, defines and the compiler's log."""


def kernel_folder() -> Path:
    """Where the `.cu` files are: in the installed package, or beside it in a checkout."""
    for folder in (_PACKAGE / "kernels", _PACKAGE.parent / "kernels"):
        if (folder / "elements.cuh").is_file():
            return folder
    raise FileNotFoundError(
        f"prosparse_cupy: no kernels found in {_PACKAGE / 'kernels'} or {_PACKAGE.parent / 'kernels'}: "
        "the installation is incomplete, reinstall prosparse-cupy."
    )


@cache
def source(kernel: str) -> str:
    """The kernel as one self-contained text: CuPy's disk cache does not see a change inside an `#include`d file."""
    return _expand(f"{kernel}.cu", set())


def _expand(file: str, included: set[str]) -> str:
    """A file with each header in the place of its first `#include`."""
    text = (kernel_folder() / file).read_text(encoding="utf-8")

    def include(match: re.Match[str]) -> str:
        header = "" if match["file"] in included else _expand(match["file"], included)
        return f'{header}#line {text.count(chr(10), 0, match.end()) + 1} "{file}"\n'

    included.add(file)

    return f'#line 1 "{file}"\n{_INCLUDE.sub(include, text)}'


def compiler_options(plan: launch.Launch) -> tuple[str, ...]:
    """NVRTC options of a launch; CuPy adds the architecture and `-ftz=true`."""
    defines = tuple(f"-D{name}" if value is None else f"-D{name}={value}" for name, value in plan.defines)
    return ("-std=c++17", *defines)


class Kernel:
    """A compiled kernel on one GPU, with the shape it is launched in."""

    def __init__(self, plan: launch.Launch, device: int) -> None:
        if _is_forked:
            _refuse_after_fork()
        self.plan = plan
        # The function keeps its module loaded for as long as this object lives.
        self._function = _compile(plan, device)
        with cupy().cuda.Device(device):
            self.launch: Launcher = launcher(self._function.ptr, plan, device)
        _launchable.add(self)
        _watch_forks()


def _compile(plan: launch.Launch, device: int) -> Any:
    cp = cupy()
    with cp.cuda.Device(device):
        try:
            try:
                return _function(plan)
            except OSError as error:  # a full disk, or a cache folder that went away
                compile_without_cache(f"could not be used ({error})")
                return _function(plan)
        except (cp.cuda.compiler.CompileException, RuntimeError) as error:  # RuntimeError: no NVRTC, no headers, a capture
            target = gpu(device)
            raise KernelCompileError(
                f"{plan.kernel}: could not be compiled for {target.name} (sm_{target.capability}) with NVRTC and "
                f"{' '.join(compiler_options(plan))}:\n{error}\n`prosparse-cupy doctor` checks NVRTC, headers and driver; "
                "before a graph capture, call warmup()."
            ) from error


def _function(plan: launch.Launch) -> Any:
    module = cupy().RawModule(code=source(plan.kernel), options=compiler_options(plan))
    function = module.get_function(plan.kernel)
    if plan.shared_bytes:
        function.max_dynamic_shared_size_bytes = plan.shared_bytes
    return function.kernel


class Dims(Protocol):
    """What is known of a call once its arguments are checked."""

    @property
    def d_model(self) -> int: ...
    @property
    def d_ff(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def formats(self) -> tuple[tuple[str, Format], ...]: ...
    @property
    def extras(self) -> tuple[str, ...]: ...
    @property
    def partial(self) -> bool: ...


@lru_cache(maxsize=4096)
def kernel_of(
    name: str, dims: Dims, specialize: bool, activation: str = RELU, batch_invariant: bool = True, in_ffn: bool = False
) -> Kernel:
    """The kernel of a checked call, looked up by the identity of `dims`, which equal calls share: every call pays for this."""
    if _is_forked:
        _refuse_after_fork()
    return load(problem_of(name, dims, specialize, activation, batch_invariant, in_ffn), dims.device)


@lru_cache(maxsize=4096)
def gate_of(dims: Dims, specialize: bool) -> Kernel | None:
    """The kernel of an FFN's gate on tensor cores, or None where these do not serve it, or `ffn_123` is faster."""
    if dims.tokens < FEWEST_OF_GATE:
        return None
    problem = replace(problem_of("ffn_1", dims, specialize, batch_invariant=False), partial=False)
    if knobs_on_tensor_cores(problem, target_of(dims.device)) is None:
        return None
    return load(problem, dims.device)


@lru_cache(maxsize=256)
def decompression_of(format_: Format, shape: tuple[int, int], device: int) -> Kernel:
    """The kernel that decompresses a weight of this shape, (d_ff, d_model), which a prompt asks for once a matrix."""
    d_ff, d_model = shape
    return load(Problem("decompress", d_model, d_ff, "bfloat16", specialize=False, formats=(format_,)), device)


def problem_of(
    name: str, dims: Dims, specialize: bool, activation: str = RELU, batch_invariant: bool = True, in_ffn: bool = False
) -> Problem:
    """What a kernel of a checked call depends on."""
    by_weight, interface = dict(dims.formats), KERNELS[name]
    formats = tuple(by_weight[weight] for weight in interface.weights)
    extras = tuple(p for p in interface.optional if p in dims.extras)
    activation = activation if interface.has_activation else RELU
    shape = dims.d_model, dims.d_ff, dims.dtype, specialize, dims.tokens
    partial = dims.partial and interface.may_be_partial
    return Problem(name, *shape, formats, activation, extras, partial, keeps_bits(name, dims.tokens, batch_invariant), in_ffn)


@cache
def load(problem: Problem, device: int) -> Kernel:
    """The kernel for a problem on a GPU, compiled at the first call and kept."""
    with loading():
        return _load_once(problem, device)


@contextmanager
def loading() -> Iterator[None]:
    """Threads that ask for a kernel at the same time get one: another's would be unloaded, though a graph may have it."""
    with _loading:
        yield


_loading = threading.RLock()


@cache
def _load_once(problem: Problem, device: int) -> Kernel:
    plan = _plan(problem, device)
    if problem.in_ffn and plan == _plan(by_itself := replace(problem, in_ffn=False), device):
        return _load_once(by_itself, device)
    kernel = Kernel(plan, device)
    _loaded.append(kernel)
    return kernel


def _plan(problem: Problem, device: int) -> launch.Launch:
    return launch.plan(problem, target_of(device), _tried.get(problem.measured))


_pretended: dict[int, Target] = {}
_tried: dict[Problem, Knobs] = {}
_loaded: deque[Kernel] = deque(maxlen=0)
"""What `trying` has loaded; nothing is kept otherwise."""


def target_of(device: int) -> Target:
    """What launches depend on of a GPU."""
    return _pretended.get(device) or Target(gpu(device).capability, gpu(device).multiprocessors, gpu(device).name)


@contextmanager
def pretending(device: int, target: Target) -> Iterator[None]:
    """Compile and launch on a GPU as on another one, such as an older one: for measurements. Not for several threads."""
    with _meanwhile(_pretended, device, target):
        yield


@contextmanager
def trying(problem: Problem, knobs: Knobs) -> Iterator[deque[Kernel]]:
    """Launch a problem with these knobs: for measurements. Not for several threads.

    Yields the kernels that are loaded meanwhile: a graph does not keep them.
    """
    global _loaded
    before, _loaded = _loaded, deque()
    try:
        with _meanwhile(_tried, problem.measured, knobs):
            yield _loaded
    finally:
        _loaded = before


K = TypeVar("K")
V = TypeVar("V")


@contextmanager
def _meanwhile(table: dict[K, V], key: K, value: V) -> Iterator[None]:
    """An entry of a table, and kernels that are loaded by it."""
    before = dict(table)
    table[key] = value
    _forget_kernels()
    try:
        yield
    finally:
        table.clear()
        table.update(before)
        _forget_kernels()


def _forget_kernels() -> None:
    for cached in (load, _load_once, kernel_of, gate_of, decompression_of):
        cached.cache_clear()


_launchable: WeakSet[Kernel] = WeakSet()
_is_forked = False


@cache
def _watch_forks() -> None:
    """From now on, what is forked is told that it cannot use CUDA, whose own functions would fail there or wait for ever."""
    os.register_at_fork(after_in_child=_after_fork)


def _after_fork() -> None:
    """Nothing is unloaded, since that would need the driver, and no lock is waited for that another thread held."""
    global _is_forked, _loading
    _is_forked, _loading = True, threading.RLock()
    kernel_of.cache_clear()
    gate_of.cache_clear()
    for kernel in _launchable:
        kernel.launch = _refuse_after_fork


def _refuse_after_fork(*_: Any) -> None:
    raise NoGPUError(
        "prosparse_cupy: this process was forked from one that had used CUDA, which does not survive a fork: start it with "
        'multiprocessing.get_context("spawn"), or use CUDA in it alone. NumPy arrays still work.'
    )
