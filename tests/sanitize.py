"""`python -m tests.sanitize`: operators under compute-sanitizer's four tools, which must have nothing to report.

Each tool is first shown a kernel with the very mistake that it looks for, since a tool that sees nothing also reports nothing.
Then it watches the GPU tests of the operators, without the pools of CuPy and torch and with scratch of exactly the size that is
needed, so that every access beyond an array is one beyond an allocation. Each tool watches several processes, which divide the
tests. The command fails where the tool is missing, where no test passed or one failed, and where anything was reported.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click
import pytest
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a program's folder is that of its file

from benchmarks.conditions import commit_of_checkout  # noqa: E402

CONTROLS = {
    "memcheck": "a[threadIdx.x + 64] = 1;",
    "racecheck": "__shared__ int s[64]; s[threadIdx.x] = a[threadIdx.x]; a[threadIdx.x] = s[63 - threadIdx.x];",
    "initcheck": "a[threadIdx.x] += 1;",
    "synccheck": "const int t = threadIdx.x % 32, half = __ballot_sync(~0u, t < 16); if (t <= 16) __syncwarp(half);",
}
"""For each tool, what a kernel of 64 threads does wrong with its 64 integers, which nobody has written."""
TOOLS = tuple(CONTROLS)
_FOUND = {
    "memcheck": "Invalid __global__ write",
    "racecheck": "Race reported between",
    "initcheck": "Uninitialized __global__ memory read",
    "synccheck": "Barrier error detected",
}
"""What each says of its control."""
_KERNELS = ("ffn_", "pack_down", "decompress", "attend", "all_reduce")  # their names, or how these begin
_OURS = [word for kernel in _KERNELS for word in ("--kernel-name", f"kernel_substring={kernel}")]
_OPTIONS = {
    # The driver's refusals are errors that operators raise, and other libraries ask for what it may refuse.
    "memcheck": [*_OURS, "--padding", "256", "--report-api-errors", "no"],
    "racecheck": _OURS,
    # It must see what other libraries' kernels write.
    "initcheck": [],
    "synccheck": _OURS,
}
_PRINTED = 100_000  # reports: every launch of a kernel that prefetches is one of racecheck's
TESTS = (
    "test_ffn_1.py::test_small_and_odd_shapes",
    "test_ffn_12.py::test_ffn_1_and_the_activation_to_the_bit",
    "test_ffn_12.py::test_boundaries_and_special_values",
    "test_ffn_123.py::test_ffn_1_and_ffn_23_to_the_bit",
    "test_ffn_23.py::test_small_and_odd_shapes",
    "test_ffn_23.py::test_activations_and_biases",
    "test_ffn_4.py::test_small_and_odd_shapes",
    "test_ffn_4.py::test_biases_and_norms",
    "test_ffn_4.py::test_more_rows_than_are_listed_at_a_time",
    "test_pack_down.py::test_transposes",
    "test_all_reduce.py::test_one_rank_whose_others_have_sent",
    "test_batches.py::test_other_dtypes",
    "test_batches.py::test_compressed_weights",
    "test_batches.py::test_dims_as_constants",
    "test_batches.py::test_batches_of_many_sizes_after_one_another",
    "test_tensor_cores.py::test_operators_on_the_gpu",
    "test_tensor_cores.py::test_weights_that_are_not_finite_on_the_gpu",
    "test_kept.py::test_small_shapes_on_the_gpu",
    "test_compressed.py::test_operators_give_the_bits_of_plain_weights",
    "test_partial.py::test_on_the_gpu",
    "test_partial.py::test_compressed_weights_on_the_gpu",
    "test_sparse_ffn.py::test_after_warmup_nothing_is_compiled",
    "test_attend.py::test_real_shapes_on_the_gpu[(24, 8, 64)-float16]",
    "test_attend.py::test_real_shapes_of_several_on_the_gpu[(24, 8, 64)-float16]",
)
"""Every kernel on shapes that are small or odd. Tools take longest for what they have not seen before, so the number of kernels
counts more than that of launches."""
WITHOUT = "not 11008 and not 13824 and not 3840 and not OnTorch"
"""The shapes of whole models, which would take most of the time, and tests of torch that repeat CuPy's."""


# What a tool says


@dataclass(frozen=True)
class Said:
    """What a tool's log says."""

    reports: tuple[str, ...]
    """Each with all its lines, without the prefix."""
    counted: int | None
    """How many the tool says that there are, or None where its summary is missing."""


_PREFIX = "========="
_SUMMARY = re.compile(r"(?:RACECHECK SUMMARY: (\d+) hazards? displayed \(.*\)|ERROR SUMMARY: (\d+) errors?)")
_HEADINGS = ("COMPUTE-SANITIZER",)


def read_log(log: str) -> Said:
    """A headline is one blank behind the prefix; what belongs to it is indented. Whatever has no known meaning is a report."""
    reports: list[list[str]] = []
    counted = None
    open_report: list[str] | None = None
    for line in log.splitlines():
        if not line.startswith(_PREFIX):
            continue
        text = line[len(_PREFIX) :].rstrip()
        if not text:
            open_report = None
        elif text.startswith("  "):
            if open_report is None:
                reports.append(open_report := [])
            open_report.append(text.strip())
        elif summary := _SUMMARY.fullmatch(text.strip()):
            counted = (counted or 0) + int(summary[1] or summary[2])
            open_report = None
        elif text.strip() in _HEADINGS:
            open_report = None
        else:
            reports.append(open_report := [text.strip()])
    return Said(tuple("\n".join(report) for report in reports), counted)


_ACCESS = re.compile(r"(?P<kind>\w+) access at (?P<function>.*)\+0x[0-9a-f]+ in (?P<file>[^:\s]+):(?P<line>\d+)")


def is_discarded_word(tool: str, report: str) -> bool:
    """Whether this is about the word that `fetch_into_l1` copies to: written by all threads, read by none, as is meant.

    Every access must be a write, from a line of that function: the kernels are compiled with line numbers for this.
    """
    if tool != "racecheck" or "Race reported between" not in report:
        return False
    accesses, first, last = [*_ACCESS.finditer(report)], *_lines_of_the_fetch()
    return len(accesses) == report.count(" access at ") and all(
        a["kind"] == "Write" and Path(a["file"]).name == "memory.cuh" and first <= int(a["line"]) <= last for a in accesses
    )


@cache
def _lines_of_the_fetch() -> tuple[int, int]:
    lines = (ROOT / "kernels" / "memory.cuh").read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if "void fetch_into_l1(" in line)
    return first + 1, lines.index("}", first) + 1


@dataclass
class Outcome:
    """What became of the tests under one tool."""

    tool: str
    passed: int = 0
    failed: int = 0
    reports: list[str] = field(default_factory=list)
    expected: int = 0
    """Reports of the discarded word."""
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    """Why the run does not count, whatever was reported."""

    @property
    def is_clean(self) -> bool:
        return not (self.problems or self.reports or self.failed) and self.passed > 0

    def as_json(self) -> dict[str, object]:
        return {**asdict(self), "is_clean": self.is_clean}

    def __str__(self) -> str:
        counts = f"{self.passed} tests passed, {self.failed} failed, {len(self.reports)} reports"
        known = f", {self.expected} of the discarded word" if self.expected else ""
        return f"{self.tool}: {'clean' if self.is_clean else 'NOT CLEAN'}: {counts}{known}, {self.seconds:.0f} s"


def judge(tool: str, log: str, tests: str) -> Outcome:
    """Of a tool's log and of what pytest has written about the tests (JUnit's XML)."""
    outcome, said = Outcome(tool), read_log(log)
    for report in said.reports:
        if is_discarded_word(tool, report):
            outcome.expected += 1
        else:
            outcome.reports.append(report)
    outcome.passed, outcome.failed = _counts(tests)
    if said.counted is None:
        outcome.problems.append("the tool wrote no summary: it did not run to its end")
    elif said.counted > len(said.reports):
        outcome.problems.append(f"the tool counts {said.counted} reports and shows {len(said.reports)}")
    if not tests.strip():
        outcome.problems.append("pytest ended without a word about its tests")
    return outcome


def together(tool: str, outcomes: Sequence[Outcome], seconds: float) -> Outcome:
    """Of the processes that divided the tests."""
    whole = Outcome(tool, seconds=seconds, problems=list(dict.fromkeys(p for o in outcomes for p in o.problems)))
    for outcome in outcomes:
        whole.passed += outcome.passed
        whole.failed += outcome.failed
        whole.expected += outcome.expected
        whole.reports += outcome.reports
    if whole.passed == 0:
        whole.problems.append("no test passed, so nothing was looked at")
    return whole


def _counts(tests: str) -> tuple[int, int]:
    """Tests that passed, and that failed, of JUnit's XML."""
    if not tests.strip():
        return 0, 0
    suites = [*ElementTree.fromstring(tests).iter("testsuite")]
    total, failures, errors, skipped = (
        sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    )
    return total - failures - errors - skipped, failures + errors


# The command


def find_sanitizer() -> str | None:
    """The program: on the path, in a wheel or in a toolkit."""
    places = [*Path(sysconfig.get_paths()["purelib"], "nvidia").glob("cu*/bin/compute-sanitizer")]
    places.append(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "compute-sanitizer"))
    return shutil.which("compute-sanitizer") or next((str(path) for path in places if os.access(path, os.X_OK)), None)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--tool", "tools", type=click.Choice(TOOLS), multiple=True, help="Only these.  [default: all four]")
@click.option("--tests", multiple=True, help="Paths or ids of tests, in place of the selection.")
@click.option("--limit", default=600, show_default=True, help="Seconds for a tool.")
@click.option(
    "--jobs", type=click.IntRange(min=1), default=min(os.cpu_count() or 1, 16), help="Processes that divide the tests."
)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the outcomes here.")
def main(tools: tuple[str, ...], tests: tuple[str, ...], limit: int, jobs: int, json_path: Path | None) -> None:
    """The GPU tests of the operators under compute-sanitizer; exit status 1 unless all is clean."""
    program = find_sanitizer()
    if program is None:
        # Wheels for CUDA 12 lack a part of it (TreeLauncherSubreaper) and start nothing.
        raise click.ClickException("there is no compute-sanitizer: pip install nvidia-cuda-sanitizer-api, 13 or later")
    selected = list(tests) or [*(f"tests/{test}" for test in TESTS), "-k", WITHOUT]
    outcomes = []
    for tool in tools or TOOLS:
        with _shown(tool):
            outcomes.append(check(program, tool, selected, limit, jobs))
        _tell(outcomes[-1])
        if json_path:  # after each: a tool can take long
            _keep(outcomes, json_path)
    sys.exit(0 if all(outcome.is_clean for outcome in outcomes) else 1)


def _keep(outcomes: Sequence[Outcome], json_path: Path) -> None:
    """Write them; what a file tells of other tools stays, with the commit that they ran on."""
    where, mine = _where(), {o.tool for o in outcomes}
    known = json.loads(json_path.read_text())["tools"] if json_path.is_file() else []
    tools = [t for t in known if t["tool"] not in mine] + [{**o.as_json(), "commit": where["commit"]} for o in outcomes]
    json_path.write_text(json.dumps({**where, "tools": tools}, indent=2) + "\n")


def check(program: str, tool: str, tests: Sequence[str], limit: float, jobs: int) -> Outcome:
    """The control under a tool, then the tests."""
    with tempfile.TemporaryDirectory() as folder:
        log, start = Path(folder, "log"), time.monotonic()
        why_not = _run(program, tool, log, f"sanitize.control({tool!r})", min(limit, 120))
        if why_not or not any(_FOUND[tool] in report for report in read_log(_text(log)).reports):
            problem = f"it does not report the control, a kernel with a known mistake {why_not}\n{_text(log)[-2000:]}"
            return Outcome(tool, seconds=time.monotonic() - start, problems=[problem])

        def watched(share: int) -> Outcome:
            log, junit = Path(folder, f"log-{share}"), Path(folder, f"tests-{share}.xml")
            arguments = [*tests, "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={junit}"]
            why_not = _run(program, tool, log, f"sanitize.run_tests({arguments!r}, {share}, {jobs})", limit)
            outcome = judge(tool, _text(log), _text(junit))
            outcome.problems += [why_not] if why_not else []
            return outcome

        with ThreadPoolExecutor(jobs) as pool:
            outcomes = [*pool.map(watched, range(jobs))]
        return together(tool, outcomes, time.monotonic() - start)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _run(program: str, tool: str, log: Path, code: str, limit: float) -> str:
    """Run Python code of this file under a tool: why it was not done in time, or nothing."""
    # A process that shares the cores with others may take more than the ten seconds that it has to start by itself.
    options = [
        "--target-processes",
        "application-only",
        "--launch-timeout",
        "120",
        "--print-limit",
        str(_PRINTED),
        "--log-file",
        str(log),
    ]
    command = [program, "--tool", tool, *_OPTIONS[tool], *options, sys.executable, "-c", f"import sanitize; {code}"]
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        out, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        return f"it did not end within {limit:.0f} s"
    if process.returncode:
        click.echo(out[-4000:], err=True)
    return ""


@contextlib.contextmanager
def _shown(tool: str) -> Iterator[None]:
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        bar.add_task(f"{tool}: its control, then the tests")
        yield


def _tell(outcome: Outcome) -> None:
    click.echo(str(outcome))
    for problem in outcome.problems:
        click.echo(f"  {problem}")
    for report in outcome.reports[:20]:
        click.echo("  " + report.replace("\n", "\n    "))
    if len(outcome.reports) > 20:
        click.echo(f"  and {len(outcome.reports) - 20} more")


def _where() -> dict[str, object]:
    """The commit, and the GPU as nvidia-smi names it: this process leaves the GPU to the others."""
    commit, clean = commit_of_checkout()
    try:
        smi = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpu = subprocess.run(smi, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        gpu = "unknown"
    return {"commit": commit, "clean": clean, "gpu": gpu}


# In the process that a tool watches


def _without_pools() -> None:
    import cupy

    cupy.cuda.set_allocator(None)
    cupy.cuda.set_pinned_memory_allocator(None)


def without_spare_bytes(put: Callable[[Any, str, Any], None]) -> None:
    """Make scratch as large as its use, so that what is written beyond is found. `put` is setattr, or undoes it later."""
    from prosparse_cupy import arguments, ops, workspace

    put(arguments, "size_class", lambda nbytes: nbytes)
    put(ops, "with_tickets", workspace.WithTickets)


def control_source(tool: str) -> str:
    return f'extern "C" __global__ void ffn_control(int* a) {{ {CONTROLS[tool]} }}'


def control(tool: str) -> None:
    """Launch a kernel that does what the tool looks for."""
    import cupy

    _without_pools()
    kernel = cupy.RawKernel(control_source(tool), "ffn_control")
    memory = cupy.empty(64, cupy.int32)
    with contextlib.suppress(Exception):  # the tool may end what the kernel runs in
        kernel((1,), (64,), (memory,))
        cupy.cuda.Device().synchronize()


class Share:
    """A plug-in of pytest that leaves every ``of``-th test, from ``number`` on."""

    def __init__(self, number: int, of: int) -> None:
        self._number, self._of = number, of

    @pytest.hookimpl(trylast=True)  # what other options leave is divided
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = items[self._number :: self._of]


def run_tests(arguments: list[str], share: int, shares: int) -> None:
    """Run a share of tests with line numbers in the kernels, which changes none of their instructions."""

    from prosparse_cupy import compiler

    _without_pools()
    without_spare_bytes(setattr)
    options = compiler.compiler_options
    compiler.compiler_options = lambda plan: (*options(plan), "-lineinfo")
    sys.exit(pytest.main(arguments, plugins=[Share(share, shares)]))


if __name__ == "__main__":
    main()
