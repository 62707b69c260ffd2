"""`python -m tests.long_run --minutes 10`: mixed work on the GPU. Its memory and the host's must stay flat, and results right.

The GPU's memory is what the driver says is taken of it, so nobody else may use the GPU meanwhile. How flatness is judged, from
samples of both memories: the first third is warm-up, where kernels are compiled and pools fill. Through the samples after it
goes a line of least squares. Its slope times its length is the growth, which may not exceed `LIMITS`; so a leak of four bytes
a call shows in ten minutes, and a pool that once grows by a block does not.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
LIMITS = {"host": 32 * MIB, "device": 32 * MIB}
"""Bytes by which each memory may grow after the warm-up."""
WARM_UP = 1 / 3
FEWEST = 6  # samples after the warm-up


@dataclass(frozen=True)
class Sample:
    """What is taken at a time."""

    seconds: float
    results: int
    host: int
    """Bytes of this process that are resident."""
    device: int
    """Bytes of the GPU that are taken, by whomever."""


@dataclass(frozen=True)
class Verdict:
    """Whether memory stayed flat after the warm-up."""

    is_flat: bool
    growth: dict[str, int]
    """Bytes by which each memory grew, along the line of least squares."""
    why: str


def after_warm_up(samples: Sequence[Sample], seconds: float) -> list[Sample]:
    """Those that count, of a run that was to last so long."""
    return [sample for sample in samples if sample.seconds >= seconds * WARM_UP]


def judge(samples: Sequence[Sample], seconds: float) -> Verdict:
    """Of a run that was to last so long."""
    counted = after_warm_up(samples, seconds)
    if len(counted) < FEWEST:
        return Verdict(False, {}, f"{len(counted)} samples after the warm-up: {FEWEST} are needed")
    times = [sample.seconds for sample in counted]
    growth = {name: growth_of(times, [getattr(sample, name) for sample in counted]) for name in LIMITS}
    grown = [
        f"{name} memory by {n / MIB:.1f} MiB, of {LIMITS[name] / MIB:.0f}" for name, n in growth.items() if n > LIMITS[name]
    ]
    return Verdict(not grown, growth, f"grew after the warm-up: {'; '.join(grown)}" if grown else "")


def growth_of(times: Sequence[float], values: Sequence[float]) -> int:
    """The slope of the line of least squares, times its length."""
    t, v = np.asarray(times, np.float64), np.asarray(values, np.float64)
    spread = t - t.mean()
    slope = (spread @ (v - v.mean())) / (spread @ spread)
    return round(slope * (t[-1] - t[0]))


def host_bytes() -> int:
    """Memory of this process that is resident."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def sample(seconds: float, results: int) -> Sample:
    """Now, when all that was launched is done."""
    import cupy

    gc.collect()
    cupy.cuda.Device().synchronize()
    free, total = cupy.cuda.runtime.memGetInfo()
    return Sample(seconds, results, host_bytes(), total - free)


def run(work: Any, seconds: float, show: Callable[[float, str], None] = lambda done, doing: None) -> list[Sample]:
    """Do work for so long, and sample memory all the while. An error is one of the work's failures, and its end."""
    start, samples = time.monotonic(), []
    every = max(0.05, seconds / 600)
    try:
        while (now := time.monotonic() - start) < seconds:
            if not samples or now - samples[-1].seconds >= every:
                samples.append(sample(now, work.results))
                show(now, f"{work.results} results, {work.checked} checked, {len(work.failures)} wrong")
            work.step()
        samples.append(sample(time.monotonic() - start, work.results))
    except Exception as error:
        work.failures.append(f"ended after {now:.0f} s and {work.results} results: {type(error).__name__}: {error}")
        traceback.print_exc()
    return samples


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--minutes", type=click.FloatRange(min=0), default=10.0, show_default=True)
@click.option("--seconds", type=click.FloatRange(min=0), help="In place of minutes.")
@click.option("--seed", type=click.IntRange(0), help="Draws the same work again.  [default: one at random, which is printed]")
@click.option("--every", type=click.IntRange(1), default=100, show_default=True, help="Check one of so many results.")
@click.option("--generate/--no-generate", "with_model", default=True, help="Whether a small model writes text in between.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write counts and samples here.")
def main(minutes: float, seconds: float | None, seed: int | None, every: int, with_model: bool, json_path: Path | None) -> None:
    """Mixed work on the GPU for some time; exit status 1 where a result was wrong or memory grew."""
    seconds = minutes * 60 if seconds is None else seconds
    seed = int(np.random.default_rng().integers(2**32)) if seed is None else seed
    click.echo(f"python -m tests.long_run --seconds {seconds:g} --seed {seed}{'' if with_model else ' --no-generate'}")
    _need_gpu()
    sys.path.insert(0, str(ROOT / "tests"))  # whose files import one another
    from mixed_work import Work

    with _progress(seconds) as show:
        show(0, "making layers")
        work = Work(seed, every, with_model)
        samples = run(work, seconds, show)
    verdict = judge(samples, seconds)
    found = summary(work, samples, verdict, seed, seconds)
    if json_path:
        json_path.write_text(json.dumps(found, indent=1) + "\n")
    _tell(found)
    sys.exit(0 if found["is_clean"] else 1)


def summary(work: Any, samples: Sequence[Sample], verdict: Verdict, seed: int, seconds: float) -> dict[str, Any]:
    """What a run found, for people and for pages."""
    is_clean = verdict.is_flat and not work.failures and work.checked > 0
    return {
        "is_clean": is_clean,
        "is_flat": verdict.is_flat,
        "seed": seed,
        "seconds": seconds,
        "results": work.results,
        "checked": work.checked,
        "failures": len(work.failures),
        "first_failures": work.failures[:20],
        "by_work": dict(sorted(work.counts.items())),
        "memory": {
            "growth": verdict.growth,
            "limits": LIMITS,
            "warm_up": WARM_UP,
            "is_flat": verdict.is_flat,
            "why": verdict.why,
        },
        "samples": [asdict(s) for s in samples],
        **where(),
    }


def where() -> dict[str, str]:
    """The GPU, the driver and the commit."""
    import cupy

    name = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
    return {"gpu": name, "cuda_driver": str(cupy.cuda.runtime.driverGetVersion()), "commit": commit()}


def commit() -> str:
    """Of this checkout."""
    from benchmarks.conditions import commit_of_checkout

    name, is_clean = commit_of_checkout()
    return name if is_clean else f"{name}-changed"


def _need_gpu() -> None:
    from prosparse_cupy.device import NoGPUError, current_device

    try:
        current_device()
    except (ImportError, NoGPUError) as error:
        raise click.ClickException(str(error)) from error


def _tell(found: dict[str, Any]) -> None:
    click.echo(f"{found['results']} results, {found['checked']} checked, {found['failures']} wrong, on {found['gpu']}")
    click.echo(", ".join(f"{name} {count}" for name, count in found["by_work"].items()))
    for failure in found["first_failures"]:
        click.echo(f"WRONG: {failure}")
    memory = found["memory"]
    grown = ", ".join(f"{name} {n / MIB:+.1f} MiB" for name, n in memory["growth"].items())
    click.echo(f"memory after the warm-up: {grown or 'unknown'}{'' if memory['is_flat'] else ', NOT FLAT: ' + memory['why']}")


@contextmanager
def _progress(seconds: float):
    """A bar on a terminal, and nothing where there is none."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=seconds)
        yield lambda done, doing: bar.update(task, completed=done, description=doing)


if __name__ == "__main__":
    main()
