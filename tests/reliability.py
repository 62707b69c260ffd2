"""`python -m tests.reliability`: what is promised, which tests hold it, and how their runs ended, for docs/reliability.md.

``junit`` keeps what a run of pytest found, ``page`` makes the page's tables of all that is kept in ``tests/results``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tests" / "results"
PAGE = ROOT / "docs" / "reliability.md"
_MARKED = re.compile(r"(?P<open><!-- made: (?P<name>[\w-]+) -->)\n.*?<!-- end -->", re.DOTALL)


@dataclass(frozen=True)
class Promise:
    """What users can rely on, and the files whose tests hold it."""

    text: str
    tests: tuple[str, ...]


_OPERATORS = ("ffn_1", "ffn_12", "ffn_123", "ffn_23", "ffn_4", "pack_down", "sparse_ffn")
PROMISES = (
    Promise("Every result is a sum in float32, rounded once, of the formula as written", (*_OPERATORS, "truth", "reference")),
    Promise("The same on generated shapes, formulas, numbers and layouts", ("generated",)),
    Promise(
        "Kernels read and write inside their arrays, and need no luck in the order of threads", ("host_kernels", "host_cuda")
    ),
    Promise(
        "A token has the bits that it has alone, and the weights of its inactive neurons cannot reach it",
        ("batches", "host_batches", "kept"),
    ),
    Promise(
        "Weights in 12 bits come back to the bit and give the bits of plain ones", ("bf12", "compressed", "torch_compressed")
    ),
    Promise("Sums that stay in float32 round to what is returned without", ("partial",)),
    Promise("Launches go to the caller's stream and GPU, and share no scratch", ("simulated", "workspace", "driver", "launch")),
    Promise("Launches that overlap read and write nothing too early", ("programmatic",)),
    Promise(
        "Without batch invariance: the same on tensor cores, but for the order of sums", ("tensor_cores", "torch_tensor_cores")
    ),
    Promise("Threads, forks, captures, full memory and broken caches: right, or a clear error", ("abuse", "cache")),
    Promise("Bad input is refused by name before anything is launched", ("arguments", "interop", "dlpack", "bound_weights")),
    Promise("Tuning never changes a bit; tables that are broken or foreign are left out", ("tune", "knobs")),
    Promise("No kernel spills or compiles to what its GPU cannot launch", ("compile",)),
    Promise(
        "A module is replaced only where it computes what its sparse form does",
        ("torch_patch", "families", "formula", "checkpoint"),
    ),
    Promise(
        "Patched modules stay torch modules", ("torch_mlp", "torch_ops", "torch_linears", "torch_tensors", "torch_sparsity")
    ),
    Promise("`generate` writes the text of transformers' loop", ("generate", "speculation", "attend", "small_model")),
    Promise("The same in threads, interrupted, out of memory, with damaged checkpoints", ("abuse_models",)),
    Promise("Split over processes, models write the text of one", ("parallel", "all_reduce")),
    Promise("The plug-in for vLLM computes what its layers did", ("engines", "vllm")),
    Promise("Nothing is fetched or run at run time but NVRTC on the package's own text", ("supply",)),
    Promise(
        "What the pages show runs as it stands",
        ("docs", "readme", "examples", "benchmarks", "cli", "doctor", "types", "packaging"),
    ),
)


@click.group()
def main() -> None:
    """What is promised, which tests hold it, and how their runs ended."""


@main.command("junit")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("name")
@click.option("--where", required=True, help="The GPU's name, or CPU.")
@click.option("--commit", required=True, help="Of the tree that was tested.")
def _junit(file: Path, name: str, where: str, commit: str) -> None:
    """Keep what a run of ``pytest --junitxml=FILE`` found as tests/results/tests-NAME.json."""
    kept = {"where": where, "commit": commit, "date": f"{datetime.now(timezone.utc):%Y-%m-%d}", "files": read_junit(file)}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"tests-{name}.json").write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_junit(file: Path) -> dict[str, dict[str, int]]:
    """How many cases of each file of tests passed, failed and were skipped."""
    found: dict[str, Counter[str]] = {}
    for case in ElementTree.parse(file).getroot().iter("testcase"):
        where = f"{case.get('classname', '')}.{case.get('name', '')}"  # a file that is skipped whole has a name alone
        module = next(part for part in where.split(".") if part.startswith("test_"))
        ended = {child.tag for child in case}
        how = "failed" if ended & {"failure", "error"} else "skipped" if "skipped" in ended else "passed"
        found.setdefault(module.removeprefix("test_"), Counter())[how] += 1
    return {module: dict(counts) for module, counts in sorted(found.items())}


@main.command("page")
def _page() -> None:
    """Make the tables of docs/reliability.md anew."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def filled(text: str) -> str:
    """A page with its tables made of what is kept: ``<!-- made: promises -->`` to ``<!-- end -->``."""
    return _MARKED.sub(lambda match: f"{match['open']}\n{TABLES[match['name']]()}\n\n<!-- end -->", text)


def _kept(name: str) -> dict[str, Any] | None:
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))


def promises() -> str:
    """A row for each promise."""
    runs = {column: _kept(f"tests-{name}") for column, name in (("CPU", "cpu"), ("GPU", "gpu"))}
    rows = [
        (p.text, ", ".join(f"`test_{t}`" for t in p.tests), *(_cases(run, p.tests) for run in runs.values())) for p in PROMISES
    ]
    lines = [
        f"{column}: {run['where']}, commit {run['commit'][:7]}, {run['date']}."
        for column, run in runs.items()
        if run is not None
    ]
    return "\n\n".join([_table(("promise", "held by", *(f"cases, {c}" for c in runs)), rows), " ".join(lines)])


def _cases(run: dict[str, Any] | None, tests: tuple[str, ...]) -> str:
    if run is None:
        return "not run yet"
    counts = sum((Counter(run["files"].get(test, {})) for test in tests), Counter())
    if counts["failed"]:
        return f"**{counts['failed']} of {counts['failed'] + counts['passed']} failed**"
    return f"{counts['passed']} passed" if counts["passed"] else "-"


def _fuzzed(run: dict[str, Any]) -> tuple[str, str]:
    return f"{run['cases']:,} cases, seed {run['seed']}", f"{len(run['failures'])} failed"


def _sanitized(run: dict[str, Any]) -> tuple[str, str]:
    tools = run["tools"]
    passed = sum(tool["passed"] for tool in tools)
    unclean = [tool["tool"] for tool in tools if not tool["is_clean"]]
    before = {tool["commit"] for tool in tools if tool.get("commit", run["commit"]) != run["commit"]}
    others = f", some at {' and '.join(sorted(before))}" if before else ""  # a tool may have been run again by itself
    result = f"not clean: {', '.join(unclean)}" if unclean else "nothing reported"
    return f"{passed:,} tests under {len(tools)} tools{others}", result


def _ran_long(run: dict[str, Any]) -> tuple[str, str]:
    memory = "memory flat" if run["is_flat"] else "memory grew"
    counts = f"{run['results']:,} results in {run['seconds'] / 60:.0f} minutes, {run['checked']:,} checked"
    return counts, f"{run['failures']} wrong, {memory}"


def _mutated(run: dict[str, Any]) -> tuple[str, str]:
    mutants = run["mutants"]
    alive = [m for m in mutants if not m["noticed_by"]]
    of_all = f" of {run['listed']}" if len(mutants) < run["listed"] else ""
    return f"{len(mutants)}{of_all} mutants", f"{len(mutants) - len(alive)} noticed, {len(alive)} named below"


RUNS: tuple[tuple[str, str, str, Callable[[dict[str, Any]], tuple[str, str]]], ...] = (
    ("generated cases, reference", "python -m tests.fuzz --backend numpy", "fuzz-numpy", _fuzzed),
    ("generated cases, kernels on the host", "python -m tests.fuzz --backend host", "fuzz-host", _fuzzed),
    ("generated cases, GPU", "python -m tests.fuzz --backend gpu", "fuzz-h100", _fuzzed),
    ("generated cases, GPU", "python -m tests.fuzz --backend gpu", "fuzz-h200", _fuzzed),
    ("compute-sanitizer", "python -m tests.sanitize", "sanitize-h100", _sanitized),
    ("ten minutes of mixed work", "python -m tests.long_run", "long-run-h100", _ran_long),
    ("kernels and Python broken on purpose", "python -m tests.mutants", "mutants", _mutated),
)


def runs() -> str:
    """A row for each of the machines that look for defects."""
    rows = []
    for what, command, name, said in RUNS:
        run = _kept(name)
        where = "" if run is None else f"{run.get('gpu') or run.get('on') or 'CPU'}, commit {run['commit'][:7]}"
        rows.append((what, f"`{command}`", *(("not run yet", "", "") if run is None else (*said(run), where))))
    return _table(("what", "command", "cases", "result", "where"), rows)


def survivors() -> str:
    """Mutants that no test on the CPU notices, and why."""
    run = _kept("mutants")
    alive = [] if run is None else [m for m in run["mutants"] if not m["noticed_by"]]
    by_reason: dict[str, list[str]] = {}
    for mutant in alive:
        by_reason.setdefault(mutant["survives"] or "no reason is known", []).append(mutant["mutant"])
    if not alive:
        return "Not run yet." if run is None else "None."
    return _table(
        ("why", "mutants"),
        [(why, "<br>".join(f"`` {name.replace('|', '&#124;')} ``" for name in names)) for why, names in by_reason.items()],
    )


TABLES = {"promises": promises, "runs": runs, "survivors": survivors}

if __name__ == "__main__":
    main()
