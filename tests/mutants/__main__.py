"""``python -m tests.mutants``: breaks one text at a time on purpose, and tells which breaks no test notices."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import Mutant, of_kernels, of_package

ROOT = Path(__file__).resolve().parents[2]
MUTANTS = [*of_kernels.MUTANTS, *of_package.MUTANTS]
_TIMEOUT_S = 900
_OF_HOST = ("test_programmatic", "test_host_kernels", "test_host_batches", "test_bf12", "test_partial", "test_simulated")
_OF_ARRAYS = ("test_arguments", "test_bound_weights", "test_interop", "test_dlpack", "test_sparse_ffn", "test_reference")
_OF_LAUNCHES = ("test_launch", "test_knobs", "test_driver", "test_workspace", "test_cache", "test_tune", "test_abuse")
_OF_FORMULAS = ("test_formula", "test_truth", "test_bf12", "test_compressed")
_OF_OPERATORS = tuple(f"test_{kernel}" for kernel in ("ffn_1", "ffn_12", "ffn_123", "ffn_23", "ffn_4", "pack_down"))


def tests_of(file: str) -> list[str]:
    """What must notice mutants of a file: what takes long comes last."""
    if file == "kernels/attend.cu":
        names: tuple[str, ...] = ("test_attend", "test_programmatic")
    elif file in ("kernels/all_reduce.cu", "prosparse_cupy/peers.py"):
        names = ("test_all_reduce", "test_programmatic")
    elif file.startswith("kernels/") and "mma" in file:
        names = ("test_tensor_cores", "test_programmatic")
    elif file.startswith("kernels/") and "kept" in file:
        names = ("test_kept",)
    elif file.startswith("kernels/"):
        names = _OF_HOST
    else:
        names = (
            *_OF_FORMULAS,
            *_OF_ARRAYS,
            *_OF_LAUNCHES,
            *_OF_OPERATORS,
            "test_simulated",
            "test_partial",
            "test_tensor_cores",
        )
    return [f"tests/{name}.py" for name in dict.fromkeys(names)]


class Outcome(NamedTuple):
    mutant: Mutant | None
    """None of the tree as it is."""
    noticed_by: str
    """The test that failed first, or nothing."""
    seconds: float


class Trees:
    """Copies of the project, one for each worker, of which one at a time is broken."""

    def __init__(self, folder: Path, jobs: int) -> None:
        self._folder, self._free = folder, SimpleQueue[Path]()
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        files = [f for f in listed.stdout.splitlines() if (ROOT / f).is_file()]
        for job in range(jobs):
            tree = folder / f"tree{job}"
            for file in files:
                (tree / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / file, tree / file)
            self._free.put(tree)

    def outcome(self, mutant: Mutant | None, tests: list[str]) -> Outcome:
        tree, start = self._free.get(), time.perf_counter()
        try:
            if mutant is None:
                return Outcome(None, self._first_failure(tree, tests), time.perf_counter() - start)
            file = tree / mutant.file
            text = file.read_text(encoding="utf-8")
            file.write_text(text.replace(mutant.old, mutant.new, 1), encoding="utf-8")
            try:
                noticed = self._first_failure(tree, tests)
            finally:
                file.write_text(text, encoding="utf-8")
            return Outcome(mutant, noticed, time.perf_counter() - start)
        finally:
            self._free.put(tree)

    def _first_failure(self, tree: Path, tests: list[str]) -> str:
        environment = {
            **os.environ,
            "PYTHONPATH": str(tree),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PROSPARSE_HOST_BUILDS": str(self._folder / "builds"),
        }
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not gpu", "-p", "no:cacheprovider", "--tb=no", *tests]
        try:
            done = subprocess.run(
                command, cwd=tree, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return f"no end within {_TIMEOUT_S} s"
        if done.returncode == 0:
            return ""
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        return failed[0].partition(" ")[2].partition(" - ")[0] if failed else (done.stdout + done.stderr)[-300:]


@click.command(help="Break kernels and Python on purpose, one text at a time, and tell which breaks no CPU test notices.")
@click.option("--only", default="", help="Mutants whose name has this text.")
@click.option("--jobs", default=max(1, (os.cpu_count() or 2)), show_default=True, help="How many at a time.")
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write here what is found, as it is found."
)
@click.option("--again", is_flag=True, help="Also run those of which the file of --json tells already.")
def main(only: str, jobs: int, json_file: Path | None, again: bool) -> None:
    console = Console()
    chosen = [m for m in MUTANTS if only in m.name]
    if not chosen:
        raise click.UsageError(f"no mutant has {only!r} in its name")
    kept, outcomes = Kept(json_file), list[Outcome]()
    if not again:
        known, chosen = [m for m in chosen if kept.has(m)], [m for m in chosen if not kept.has(m)]
        outcomes = [kept.outcome(m) for m in known]
        if not chosen:
            console.print("all of them have been run: --again runs them once more")
            sys.exit(_report(console, outcomes))
    for mutant in chosen:
        if mutant.old not in (ROOT / mutant.file).read_text(encoding="utf-8"):
            raise click.ClickException(f"{mutant.file} has no text {mutant.old!r}: mend the list of mutants")
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(jobs) as pool:
        trees = Trees(Path(folder), jobs)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=console) as progress:
            every = sorted({test for mutant in chosen for test in tests_of(mutant.file)})
            task = progress.add_task("the tests of what is whole", total=1)
            if failure := trees.outcome(None, every).noticed_by:
                raise click.ClickException(f"the tests fail on the tree as it is: {failure}")
            progress.update(task, completed=1)
            task = progress.add_task("mutants", total=len(chosen))
            for outcome in pool.map(lambda m: trees.outcome(m, tests_of(m.file)), chosen):
                outcomes.append(outcome)
                kept.add(outcome)
                progress.advance(task)
                if not outcome.noticed_by and outcome.mutant and not outcome.mutant.survives:
                    progress.console.print(f"alive: {outcome.mutant.name}", markup=False, highlight=False)
    sys.exit(_report(console, outcomes))


class Kept:
    """What a file tells of mutants that have been run, each with its commit, so that a long run can be taken up again.

    Mutants whose texts or reasons have changed count as new ones, and those that are gone are dropped. What the tests and the
    rest of the tree have become since does not count: ``--again`` runs all.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        rows = json.loads(file.read_text(encoding="utf-8"))["mutants"] if file is not None and file.is_file() else []
        listed = {m.digest for m in MUTANTS}
        self._rows = {row["digest"]: row for row in rows if row["digest"] in listed}
        said = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
        self._commit = said.stdout.strip() or "unknown"

    def has(self, mutant: Mutant) -> bool:
        return mutant.digest in self._rows

    def outcome(self, mutant: Mutant) -> Outcome:
        """Of one that has been run."""
        row = self._rows[mutant.digest]
        return Outcome(mutant, row["noticed_by"], row["seconds"])

    def add(self, outcome: Outcome) -> None:
        if self._file is None or outcome.mutant is None:
            return
        mutant, seconds = outcome.mutant, round(outcome.seconds, 1)
        facts = {"noticed_by": outcome.noticed_by, "survives": mutant.survives, "seconds": seconds, "commit": self._commit}
        self._rows[mutant.digest] = {"mutant": mutant.name, "digest": mutant.digest, **facts}
        found = {"commit": self._commit, "listed": len(MUTANTS), "mutants": list(self._rows.values())}
        beside = self._file.with_suffix(".new")
        beside.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        beside.replace(self._file)


def _report(console: Console, outcomes: list[Outcome]) -> int:
    """Print what was found; 1 if a mutant lives that should not, or one died that is said to live."""
    alive = [o.mutant for o in outcomes if o.mutant and not o.noticed_by]
    unexpected = [m for m in alive if not m.survives]
    wrong = [o for o in outcomes if o.mutant and o.mutant.survives and o.noticed_by]
    table = Table("mutant", "why no test on the CPU notices it")
    for mutant in alive:
        table.add_row(mutant.name, mutant.survives or "[red]no reason is known[/red]")
    console.print(table)
    for outcome in wrong:
        console.print(f"said to live, but {outcome.noticed_by} notices: {outcome.mutant}", markup=False)
    console.print(
        f"{len(outcomes) - len(alive)} of {len(outcomes)} mutants are noticed, {len(unexpected)} live without a reason"
    )
    return 1 if unexpected or wrong else 0


if __name__ == "__main__":
    main()
