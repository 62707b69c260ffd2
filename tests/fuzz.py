"""Runs generated cases until the time is over: ``python -m tests.fuzz --help``."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(_HERE), str(_HERE.parent)]  # the tests' modules, and `benchmarks`

import click  # noqa: E402
from cases import KINDS, SPECIALIZED, Case, Kind, cases_of  # noqa: E402
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from properties import Place, check  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402
from rich.table import Table  # noqa: E402

from prosparse_cupy.device import NoGPUError, current_device, gpu  # noqa: E402

GPU, HOST, NUMPY = BACKENDS = ("gpu", "host", "numpy")
_ON_HOST = ((264, 101), (8, 1), (40, 700), (520, 33), (2304, 3), (64, 72))  # where a column costs more than a row
_SIZES: dict[str, dict[str, Any]] = {
    GPU: {"elements": 600_000, "longest": 1100, "specialized": SPECIALIZED},
    HOST: {"elements": 8_000, "longest": 72, "specialized": _ON_HOST, "ways": ("call", "stream", "graph")},
    NUMPY: {"elements": 40_000, "specialized": SPECIALIZED, "ways": ("call",)},
}
_PER_KIND = {GPU: 250, HOST: 60, NUMPY: 20}
_SHARE_SPECIALIZED = 0.2
_PATIENCE = 300.0  # seconds that a case may take


class _TimeIsOver(KeyboardInterrupt):
    """Ends a run of hypothesis, which takes other exceptions for failures of the case."""


@dataclass
class Plan:
    """What one of the processes does."""

    backend: str
    seed: int
    worker: int
    workers: int
    per_kind: int
    cases: int | None
    """At most so many of its own."""
    seconds: float
    """From its own start on."""
    builds: str


@dataclass
class Found:
    """What has come of all processes."""

    cases: int = 0
    operators: Counter[str] = field(default_factory=Counter)
    properties: Counter[str] = field(default_factory=Counter)
    kinds: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)
    """Cases, and what is wrong with them."""


@contextmanager
def _opened(backend: str, builds: str) -> Iterator[Place]:
    if backend != HOST:
        yield Place(backend)
        return
    from host_cuda import HostKernels
    from simulated import simulated

    kernels = HostKernels(Path(builds))
    try:
        with simulated(kernels) as cuda:
            yield Place(backend, cuda.random.seed)
    finally:
        kernels.close()


def _sizes(backend: str) -> dict[str, Any]:
    if backend != GPU:
        return _SIZES[backend]
    try:
        import torch

        has_torch = torch.cuda.is_available()
    except ImportError:
        has_torch = False
    return {**_SIZES[GPU], "ways": ("call", "stream", "graph", "dlpack", *(("torch",) * has_torch))}


def _kinds_of(plan: Plan) -> Iterator[tuple[int, Kind, tuple[int, int]]]:
    """Kinds of a process in an order that the seed decides, each with a seed and the dims that are compiled in."""
    rng, shapes = random.Random(plan.seed), _SIZES[plan.backend]["specialized"]
    dynamic, constant = ([k for k in KINDS if k.specialize == flag] for flag in (False, True))
    for number in range(sys.maxsize):
        pool = constant if rng.random() < _SHARE_SPECIALIZED else dynamic
        kind, dims, own_seed = rng.choice(pool), rng.choice(shapes), rng.randrange(2**63)
        if number % plan.workers == plan.worker:
            yield own_seed, kind, dims


class _Worker:
    """One of the processes. It tells the first one of each case before it runs, so that it is known if this process dies."""

    def __init__(self, plan: Plan, place: Place, send: Connection) -> None:
        self._plan, self._place, self._send = plan, place, send
        self._until = time.time() + plan.seconds
        self._seen = set[Case]()
        self._operators = Counter[str]()

    def run(self) -> None:
        sizes = _sizes(self._plan.backend)
        every = settings(
            max_examples=self._plan.per_kind,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        for own_seed, kind, dims in _kinds_of(self._plan):
            cases = cases_of(kind, **{**sizes, "specialized": (dims,)})
            try:
                seed(own_seed)(every(given(cases)(lambda case: self._one(case))))()
            except _TimeIsOver:
                break
            finally:
                self._send.send(("counts", self._operators, self._place.counts.copy()))
                self._operators.clear()
                self._place.counts.clear()
        self._send.send(("done",))

    def _one(self, case: Case) -> None:
        plan = self._plan
        if time.time() > self._until or (plan.cases is not None and len(self._seen) >= plan.cases):
            raise _TimeIsOver
        if case in self._seen:
            return
        self._seen.add(case)
        self._send.send(("case", repr(case)))
        try:
            check(case, self._place)
        except Exception as error:
            self._send.send(("failed", repr(case), _told(error)))
            raise _TimeIsOver from None
        self._operators[case.operator] += 1


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if isinstance(error, AssertionError) else traceback.format_exc()


def _process(plan: Plan, send: Connection) -> None:
    with suppress(KeyboardInterrupt), _opened(plan.backend, plan.builds) as place:
        _Worker(plan, place, send).run()


class _Processes:
    """All workers, and what comes of them."""

    def __init__(self, plans: list[Plan]) -> None:
        self.found = Found()
        self._running: dict[Connection, BaseProcess] = {}
        self._last: dict[Connection, str] = {}
        """The case that a process is at, or that it is done."""
        self._heard: dict[Connection, float] = {}
        context = multiprocessing.get_context("spawn")
        for plan in plans:
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_process, args=(plan, send), daemon=True)
            process.start()
            send.close()
            self._running[receive], self._last[receive], self._heard[receive] = process, "", time.time()

    def run(self, show: Callable[[Found], None]) -> Found:
        while self._running and not self.found.failures:
            for receive in wait(list(self._running), timeout=1.0):
                self._hear(receive)
            for receive, at in self._heard.items():
                if receive in self._running and time.time() - at > _PATIENCE:
                    self.found.failures.append((self._last[receive], f"no end after {_PATIENCE:.0f} s"))
            show(self.found)
        for process in self._running.values():
            process.terminate()
            process.join()
        return self.found

    def _hear(self, receive: Connection) -> None:
        found, self._heard[receive] = self.found, time.time()
        try:
            kind, *message = receive.recv()
        except EOFError:
            process = self._running.pop(receive)
            process.join()
            if process.exitcode or self._last[receive] != "done":
                found.failures.append((self._last[receive], f"its process ended with exit code {process.exitcode}"))
            return
        if kind == "case":
            self._last[receive], found.cases = message[0], found.cases + 1
        elif kind == "failed":
            found.failures.append((message[0], message[1]))
        elif kind == "counts":
            found.kinds += bool(message[0])
            found.operators.update(message[0])
            found.properties.update(message[1])
        else:
            self._last[receive] = "done"


@contextmanager
def _progress(cases: int | None, seconds: float) -> Iterator[Callable[[Found], None]]:
    """A bar on a terminal, and nothing where there is none."""
    console, began = Console(stderr=True), time.time()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=cases or seconds)
        yield lambda found: bar.update(
            task, description=f"{found.cases} cases", completed=found.cases if cases else time.time() - began
        )


def _name_of(backend: str) -> str:
    """Of the GPU, or of what stands in for one."""
    if backend != GPU:
        return backend
    try:
        return gpu(current_device()).name
    except (ImportError, NoGPUError) as error:
        raise click.ClickException(str(error)) from error


def _summary(found: Found, **head: Any) -> dict[str, Any]:
    from benchmarks.conditions import commit_of_checkout

    commit, clean = commit_of_checkout()
    failures = [{"case": case, "why": why} for case, why in found.failures]
    counts = {"cases": found.cases, "operators": dict(found.operators), "properties": dict(found.properties)}
    return {**head, "commit": commit, "clean": clean, "kinds": found.kinds, **counts, "failures": failures}


def _print(found: Found, seconds: float) -> None:
    console = Console()
    table = Table("", "times", title=f"{found.cases} cases of {found.kinds} kinds, {seconds:.0f} s")
    for name, count in [*sorted(found.operators.items()), *sorted(found.properties.items())]:
        if name != "cases":
            table.add_row(name, str(count))
    console.print(table)


def _repeat(backend: str, line: str, builds: str) -> None:
    case = Case.parse(line)
    with _opened(backend, builds) as place:
        check(case, place)
    click.echo(f"{case.operator}: right, {sum(place.counts.values()) - 1} checks")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--backend", type=click.Choice(BACKENDS), default=GPU, show_default=True, help="Where operators run.")
@click.option("--seconds", type=float, help="Stop after so long.  [default: 60, without --cases]")
@click.option("--cases", type=click.IntRange(1), help="Stop after so many.")
@click.option("--seed", "seed_", type=int, help="Of everything that is drawn.  [default: drawn, and printed]")
@click.option("--workers", type=click.IntRange(1), help="Processes.  [default: one for each CPU]")
@click.option("--per-kind", type=click.IntRange(1), help="Cases that share kernels.  [default: 250; host 60, numpy 20]")
@click.option("--case", "line", help="Run this case alone, as a failure prints it.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write a summary here.")
@click.option("--builds", type=click.Path(file_okay=False), help="Keep kernels that are built for the host here.")
def main(backend, seconds, cases, seed_, workers, per_kind, line, json_path, builds) -> None:
    """Generated cases of every operator: other shapes, formulas and numbers, and what must hold for each.

    numpy runs the reference, host the kernels on simulated GPUs under sanitizers, gpu the kernels on the current GPU.

    A kind of case is what kernels are compiled for (dtype, tokens, formula, format): its ten to thirty kernels take half a
    second each to compile on a GPU, so some hundred cases are drawn of each kind. One kind in five has its dims compiled in,
    and one shape. 20,000 cases with 16 processes take some minutes:

        python -m tests.fuzz --backend gpu --cases 20000 --workers 16 --json fuzz.json

    It ends at the first case that fails, with the line that repeats it.
    """
    on = _name_of(backend)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # processes are many enough
    with nullcontext(builds) if builds else tempfile.TemporaryDirectory() as folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        if line:
            _repeat(backend, line, folder)
            return
        seed_ = random.randrange(2**32) if seed_ is None else seed_
        workers = min(workers or len(os.sched_getaffinity(0)), cases or sys.maxsize)
        click.echo(f"seed {seed_}, {workers} processes")
        began, most = time.time(), seconds or (float("inf") if cases else 60.0)
        each = [None if cases is None else (cases + worker) // workers for worker in range(workers)]
        common = (workers, per_kind or _PER_KIND[backend])
        plans = [Plan(backend, seed_, worker, *common, of_it, most, folder) for worker, of_it in enumerate(each)]
        with _progress(cases, most) as show:
            found = _Processes(plans).run(show)
        took = time.time() - began
    _print(found, took)
    if json_path:
        summary = _summary(found, backend=backend, on=on, seed=seed_, seconds=round(took, 1))
        json_path.write_text(json.dumps(summary, indent=1) + "\n")
    for case, why in found.failures:
        click.echo(f"\n{why}\n\npython -m tests.fuzz --backend {backend} --case {case!r}", err=True)
    if found.failures or not found.cases:
        sys.exit(1)


if __name__ == "__main__":
    main()
