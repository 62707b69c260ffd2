"""The commands: each measures, checks, prints a table and writes what it found."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from prosparse_cupy.arguments import MOST_TOKENS
from prosparse_cupy.device import NoGPUError, cupy, current_device
from prosparse_cupy.formula import DRELU, RELU
from prosparse_cupy.libraries import NUMPY_DTYPES
from prosparse_cupy.models import (
    AFM_4_5B,
    BITNET_2B,
    GLM_4_9B,
    LLAMA_2_7B,
    LLAMA_2_13B,
    MINICPM_S_1B,
    MINITRON_4B,
    NANOCHAT_D32,
    NEMOTRON_H_8B,
    OPT_6_7B,
    PERSIMMON_8B,
    RELU_LLAMA_70B,
    RWKV_7_2_9B,
    TURBOSPARSE_MISTRAL,
    Model,
)
from prosparse_cupy.tensor_cores import FEWEST_TOKENS
from prosparse_cupy.testing import best_dense
from prosparse_cupy.testing.layers import CORRELATED, MASKS, STEPS, Layers, operators_of

from . import compare, conditions, tables
from . import host as host_times
from .first_release import first_release
from .measure import GRAPH, WALLCLOCK, Setting, measure, portable
from .paper import PUBLISHED
from .results import BatchesRow, DecodeRow, Result, Row, read_json, write_csv, write_json

MODELS = {"1B": MINICPM_S_1B, "7B": LLAMA_2_7B, "13B": LLAMA_2_13B, "Minitron-4B": MINITRON_4B, "AFM-4.5B": AFM_4_5B}
_FORMULAS = {"BitNet-2B": BITNET_2B, "TurboSparse-7B": TURBOSPARSE_MISTRAL}
"""Whose formula costs more than a gated ReLU's; each is timed beside that of the same dims.

dReLU's up-projection makes half of the active neurons zero, so it is timed both with the ReLU's share of x1 and of gates.
"""
_WHOLE_FFNS = _FORMULAS | {
    "GLM-4-9B": GLM_4_9B,
    "Nemotron-H-8B": NEMOTRON_H_8B,
    "nanochat-d32": NANOCHAT_D32,
    "Persimmon-8B": PERSIMMON_8B,
    "OPT-6.7B": OPT_6_7B,
    "RWKV-7-2.9B": RWKV_7_2_9B,
}
"""Of which `sweep` times the whole FFN alone, where they are asked for."""
_WHOLE = {
    "7B": LLAMA_2_7B,
    "13B": LLAMA_2_13B,
    "7B SiLU": Model("llama-2-7b", 4096, 11008, 32, 0.0, 0.0),
    "AFM-4.5B": replace(AFM_4_5B, threshold=0.01),  # by hand, see decode.random_model
}
Show = Callable[[str, int], None]

_ROOT = Path(__file__).resolve().parent.parent
RESULTS = _ROOT / "benchmarks" / "results"
PAGES = (
    "README.md",
    *(f"docs/{name}.md" for name in ("performance", "measurements", "operators", "models", "compression", "engines")),
)
BATCHES = (1, 2, 4, 8)
_OF_BATCHES = (*STEPS, "SparseFFN")
_STOPPED = "stopped before all was measured"
SPARSITIES = (0.0, 0.3, 0.5, 0.66, 0.8, 0.9, 0.95, 0.97, 0.99, 1.0)

_json = click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the result here.")
_csv = click.option("--csv", "csv_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the rows here.")
_quick = click.option("--quick", is_flag=True, help="Fewer settings and repeats: a look, not a result.")
_method = click.option(
    "--method",
    type=click.Choice([GRAPH, WALLCLOCK]),
    default=GRAPH,
    show_default=True,
    help="graph: many layers in a CUDA graph, cache cold. wallclock: the paper's, the host's clock around launch and "
    "synchronise, one layer over and over.",
)
_portable = click.option("--portable", "is_portable", is_flag=True, help="Kernels as an sm_80 GPU gets them.")

_WEIGHTS = ("plain", "bf12")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Timings of prosparse-cupy's operators. Every row is checked against float64 on the very arrays that were timed."""


def _options(command):
    for option in (_json, _csv, _quick, _method, _portable):
        command = option(command)
    return command


@main.command()
@_options
def paper(**options) -> None:
    """The eight settings of the ProSparse paper's table, beside the published times."""
    published = PUBLISHED[:1] if options["quick"] else PUBLISHED
    settings = [Setting(op, p.model, p.label, "bfloat16", "hot", p.sparsity) for p in published for op in STEPS[1:]]
    _run("paper", settings, **options)


@main.command()
@_options
@click.option(
    "--model",
    "names",
    type=click.Choice([*MODELS, *_WHOLE_FFNS]),
    multiple=True,
    help=f"Only these.  [default: {', '.join(MODELS)}]",
)
@click.option("--dtype", "dtypes", type=click.Choice(list(NUMPY_DTYPES)), multiple=True, help="Only these.  [default: all]")
@click.option("--mask", "masks", type=click.Choice(["hot", "uniform", "contiguous"]), multiple=True, default=["hot"])
@click.option("--at", "sparsities", type=click.FloatRange(0, 1), multiple=True, help="Only these sparsities.")
@click.option("--weights", type=click.Choice(_WEIGHTS), multiple=True, default=["plain"], help="bf12 is of bfloat16 alone.")
def sweep(names, dtypes, masks, sparsities, weights, **options) -> None:
    """Every operator and the whole FFN over sparsities, models and dtypes."""
    known = MODELS | _WHOLE_FFNS
    wanted = sparsities or ((0.0, 0.9) if options["quick"] else SPARSITIES)
    settings = [
        Setting(op, known[name], name, dtype, mask, sparsity, format_)
        for name in names or MODELS
        for dtype in dtypes or NUMPY_DTYPES
        for format_ in weights
        if format_ == "plain" or dtype == "bfloat16"
        for mask in masks
        for sparsity in wanted
        for op in (operators_of(known[name]) if name in MODELS else ("SparseFFN",))
        if op not in ("sparse_ffn", "three operators")
        if op not in ("ffn_1", "ffn_12") or (mask, sparsity) == (masks[0], wanted[0])  # which are dense: once
    ]
    _run("sweep", settings, **options)


@main.command()
@_options
def ffn(**options) -> None:
    """The whole FFN at each model's own sparsity: its operators, and ways to call all of it."""
    settings = [
        Setting(op, model, name, "bfloat16", "hot", model.sparsity, format_, with_dense=(op, format_) == ("SparseFFN", "plain"))
        for name, model in (MODELS | _FORMULAS | _with_relu(_FORMULAS)).items()
        for format_ in _WEIGHTS
        for op in operators_of(model)
        if not (options["quick"] and name == "13B")
        if name in MODELS or op == "SparseFFN"
    ]
    settings += [replace(s, sparsity=(1 + s.sparsity) / 2) for s in settings if s.model.activation == DRELU]
    _run("ffn", settings, **options)


def _with_relu(models: dict[str, Model]) -> dict[str, Model]:
    """The same dims and sparsities with a gated ReLU."""
    plain = {"threshold": 0.01, "activation": RELU, "normed": False}
    return {f"{name} dims, ReLU": replace(model, name=f"{model.name}, ReLU", **plain) for name, model in models.items()}


@main.command()
@_options
@click.option(
    "--model", "names", type=click.Choice([*MODELS, *_WHOLE_FFNS]), multiple=True, default=["7B", "13B"], show_default=True
)
@click.option(
    "--batch", "batches", type=click.IntRange(1, MOST_TOKENS), multiple=True, help="Only these.  [default: 1, 2, 4, 8]"
)
@click.option("--mask", "masks", type=click.Choice([*MASKS, CORRELATED]), multiple=True, default=["hot", CORRELATED])
@click.option("--at", "sparsities", type=click.FloatRange(0, 1), multiple=True, default=[0.89], show_default=True)
@click.option("--weights", type=click.Choice(_WEIGHTS), multiple=True, default=list(_WEIGHTS), show_default=True)
@click.option("--op", "ops", type=click.Choice(_OF_BATCHES), multiple=True, default=_OF_BATCHES, show_default=True)
def batch(names, batches, masks, sparsities, weights, ops, **options) -> None:
    """Several tokens a call: operators and the whole FFN, and at 8 tokens the FFN called eight times.

    From 5 tokens on also what is not batch-invariant, on tensor cores.

    Masks are of one sparsity for each token: independent of the other tokens', or correlated, each token sharing 60 % of its
    active neurons with all others. What a call must read is the union.
    """
    known = MODELS | _WHOLE_FFNS
    wanted = batches or ((1, 8) if options["quick"] else BATCHES)
    settings = [
        Setting(
            op,
            known[name],
            name,
            "bfloat16",
            mask,
            sparsity,
            format_,
            tokens=tokens,
            with_singles=op == "SparseFFN" and tokens == 8,
            with_varying=op != "ffn_23" and tokens >= FEWEST_TOKENS and format_ == "plain",
        )
        for name in names
        for tokens in wanted
        for op in ops
        if op in operators_of(known[name])
        for format_ in weights
        for mask in masks
        for sparsity in sparsities
        if tokens > 1 or mask != CORRELATED or len(masks) == 1  # one token has nothing in common with itself
        if op != "ffn_1" or (mask, sparsity) == (masks[0], sparsities[0])  # which is dense: once
    ]
    _run("batch", settings, **options)


@main.command()
@_json
@_csv
@_quick
def host(json_path: Path | None, csv_path: Path | None, quick: bool) -> None:
    """Time on the calling thread per call, by array family."""
    _need_gpu()
    yard, watch = conditions.prepare()
    rows = watch.undisturbed(lambda: host_times.measure(LLAMA_2_7B, "7B", 20 if quick else 100), "7B")
    _finish(Result(conditions.head("host", "host thread", "torch eager FFN", yard, watch), tuple(rows)), json_path, csv_path)


@main.command()
@_json
@_csv
@_quick
@click.option("--model", "names", type=click.Choice(list(_WHOLE)), multiple=True, help="Only these.  [default: all]")
@click.option("--checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A model on disk instead.")
@click.option("--trust-remote-code", is_flag=True, help="Let the checkpoint bring its own model code, and run it.")
def decode(
    names: tuple[str, ...],
    checkpoint: Path | None,
    trust_remote_code: bool,
    json_path: Path | None,
    csv_path: Path | None,
    quick: bool,
) -> None:
    """Tokens a second of whole models, dense, patched and compressed: LLaMA shapes, random weights, published sparsities."""
    _need_gpu()
    try:
        from . import decode as models
    except ImportError as error:
        raise click.ClickException(f'decode needs torch and transformers, which the extra "hf" brings: {error}') from error
    yard, watch = conditions.prepare()
    rows: list[DecodeRow] = []
    dense = best_dense(NUMPY_DTYPES["bfloat16"])
    repeats = 16 if quick else 48
    labels = [checkpoint.name] if checkpoint else names or tuple(_WHOLE)
    with _progress(len(labels)) as show:

        def measure(label: str, say: Callable[[str], None]) -> list[DecodeRow]:
            say("making the model")
            if checkpoint:
                model, prompt = models.load(checkpoint, trust_remote_code)
            else:
                model = models.random_model(_WHOLE[label])
                prompt = models.random_prompt(model)
            by_hand = None if checkpoint or _WHOLE[label].gated else _WHOLE[label].threshold
            found = models.measure_model(model, prompt, label, yard, repeats, say, threshold=by_hand)
            del model
            models.free_memory()
            return found

        for done, label in enumerate(labels):
            say = lambda doing, label=label, done=done: show(f"{label}: {doing}", done)  # noqa: E731
            rows += watch.undisturbed(partial(measure, label, say), label)
    _finish(Result(conditions.head("decode", "graph", dense.name, yard, watch), tuple(rows)), json_path, csv_path)


@main.command()
@_json
@_csv
@_quick
@click.option("--model", "names", type=click.Choice(["7B", "13B"]), multiple=True, default=["7B"], show_default=True)
@click.option(
    "--batch", "sizes", type=click.Choice([*map(str, BATCHES)]), multiple=True, help="Only these.  [default: 1, 2, 4, 8]"
)
@click.option(
    "--compiled",
    type=click.Choice([*map(str, BATCHES)]),
    multiple=True,
    default=["1", "8"],
    show_default=True,
    help="Batches that torch compiles the unpatched model's whole step for: half a minute each.",
)
def batches(
    names: tuple[str, ...],
    sizes: tuple[str, ...],
    compiled: tuple[str, ...],
    json_path: Path | None,
    csv_path: Path | None,
    quick: bool,
) -> None:
    """Tokens a second of whole models for 1 to 8 sequences at once, and of one with guesses looked up in its text.

    What is there of a result is written after each format of the weights. A disturbance is noted, and nothing measured again.
    """
    _need_gpu()
    try:
        from . import batches as several
        from . import decode as models
    except ImportError as error:
        raise click.ClickException(f'batches needs torch and transformers, which the extra "hf" brings: {error}') from error
    yard, watch = conditions.prepare()
    dense = best_dense(NUMPY_DTYPES["bfloat16"])
    wanted = tuple(map(int, sizes)) or ((1, 8) if quick else BATCHES)
    whole = tuple(batch for batch in map(int, compiled) if batch in wanted)
    rows: list[BatchesRow] = []
    start = time.perf_counter()

    def result() -> Result:
        return Result(conditions.head("batches", "host clock", dense.name, yard, watch), tuple(rows))

    for label in names:
        say = lambda doing, label=label: click.echo(f"{time.perf_counter() - start:5.0f} s  {label}: {doing}", err=True)  # noqa: E731
        say("making the model")
        model = models.random_model(_WHOLE[label])
        several.go_round(model)
        for found in several.measure_batches(model, label, 8 if quick else 24, say, wanted, whole):
            rows += found
            watch.look(f"{label}, {found[-1].weights}" if found else label)
            if json_path:
                write_json(result(), json_path)
        del model
        models.free_memory()
    _finish(result(), json_path, csv_path)


@main.command()
@_json
@_quick
@click.option("--model", "names", type=click.Choice(["7B", "13B", "70B"]), multiple=True, default=["13B"], show_default=True)
def parallel(names: tuple[str, ...], json_path: Path | None, quick: bool) -> None:
    """Tokens a second of whole models that transformers has split over the GPUs of this host.

    Run it in every process: ``torchrun --nproc-per-node 2 -m benchmarks parallel --model 13B``. The first process measures each
    model on one GPU first, but for 70B, which does not fit, and writes each row as soon as it is there.
    """
    _need_gpu()
    try:
        import torch
        import torch.distributed as dist

        from . import parallel as models
        from .decode import random_model
    except ImportError as error:
        raise click.ClickException(f'parallel needs torch and transformers, which the extra "hf" brings: {error}') from error
    if "WORLD_SIZE" not in os.environ:
        raise click.ClickException("parallel: run it by torchrun --nproc-per-node GPUS -m benchmarks parallel")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    mesh = dist.init_device_mesh("cuda", (dist.get_world_size(),))
    is_first, repeats, start = dist.get_rank() == 0, 8 if quick else 32, time.perf_counter()
    yard, watch = conditions.prepare()
    rows: list[DecodeRow] = []

    def say(label: str, doing: str) -> None:
        if is_first:
            click.echo(f"{time.perf_counter() - start:5.0f} s  {label}: {doing}", err=True)

    def result() -> Result:
        return Result(conditions.head("parallel", "host clock", "our step, unpatched", yard, watch), tuple(rows))

    def measure(label: str, make: Callable[[], Any], gpus: int) -> None:
        say(label, f"making the model for {gpus} GPUs")
        model = make()
        for row in models.measure_parallel(model, label, gpus, repeats, partial(say, label)):
            rows.append(row)
            if is_first and json_path:
                write_json(result(), json_path)
        del model
        models.free_memory()

    for label in names:
        record = _WHOLE.get(label, RELU_LLAMA_70B)
        if is_first and label not in models.KV_HEADS:
            measure(label, partial(random_model, record), 1)
        dist.barrier()
        measure(label, partial(models.split_model, record, label, mesh), dist.get_world_size())
    dist.destroy_process_group()
    if is_first:
        _finish(result(), json_path, None)


@main.command("compare")
@click.argument("old", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("new", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--percent", type=click.FloatRange(0), default=3.0, show_default=True, help="Slower by more is a regression.")
def compare_command(old: Path, new: Path, percent: float) -> None:
    """What got faster or slower from OLD.json to NEW.json beyond the noise; exit status 1 on a regression."""
    before, after = _read(old), _read(new)
    for difference in compare.differences(before, after):
        click.echo(f"not the same {difference}", err=True)
    found = compare.compare(before, after, percent)
    if not found:
        raise click.ClickException(f"{old} and {new} have no row in common")
    Console(width=None if sys.stdout.isatty() else 120).print(tables.changes(found))
    bad = {compare.Verdict.REGRESSION, compare.Verdict.BROKEN}
    sys.exit(any(change.verdict in bad for change in found))


@main.command()
@click.argument("pages", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def report(pages: tuple[Path, ...]) -> None:
    """Make the tables in PAGES (README.md and those in docs/) and the figures anew from the committed results."""
    results = stored_results()
    for page in pages or tuple(_ROOT / name for name in PAGES):
        page.write_text(tables.fill(page.read_text(encoding="utf-8"), results), encoding="utf-8")
    try:
        from . import figures
    except ImportError as error:
        raise click.ClickException(f'figures need matplotlib, which the extra "bench" brings: {error}') from error
    for model in ("7B", "13B"):
        figures.save(figures.speedup(results["sweep"], model), RESULTS / f"h100-speedup-{model.lower()}.svg")
    figures.save(figures.where_time_goes(results["ffn"]), RESULTS / "h100-where-time-goes.svg")
    figures.save(figures.paper(results["paper"]), RESULTS / "h100-paper.svg")
    figures.save(figures.batch(results["batch"]), RESULTS / "h100-batch.svg")
    figures.save(figures.decode(results["decode"]), RESULTS / "h100-decode.svg")


def stored_results() -> dict[str, Result]:
    """The committed results of an H100."""
    return {name: _read(RESULTS / tables.result_file(name)) for name in tables.TABLES}


def _read(path: Path) -> Result:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error


def _run(
    command: str,
    settings: list[Setting],
    quick: bool,
    method: str,
    json_path: Path | None,
    csv_path: Path | None,
    is_portable: bool,
) -> None:
    _need_gpu()
    with portable() if is_portable else nullcontext():
        result = _measure_all(command, settings, 15 if quick else 40, method, is_portable)
    _finish(result, json_path, csv_path)


def _need_gpu() -> None:
    try:
        current_device()
    except (ImportError, NoGPUError) as error:
        raise click.ClickException(str(error)) from error


def _finish(result: Result, json_path: Path | None, csv_path: Path | None) -> None:
    """Print, write; exit status 1 where a check failed, or not all was measured: that is written to a file of its own."""
    Console(width=None if sys.stdout.isatty() else 150).print(tables.terminal(result))
    for disturbance in result.head.disturbances:
        click.echo(f"disturbed: {disturbance}", err=True)
    is_stopped = _STOPPED in result.head.disturbances
    for path, write in ((json_path, write_json), (csv_path, write_csv)):
        if path:
            to = path.with_suffix(f".partial{path.suffix}") if is_stopped else path
            write(result, to)
            if is_stopped:
                click.echo(f"what was measured is in {to}", err=True)
    for row in result.failed:
        click.echo(
            f"CHECK FAILED: {row.op} {row.model} {row.dtype} {row.setting} {row.sparsity:.2%}: error {row.error:.3g}", err=True
        )
    sys.exit(1 if result.failed or is_stopped else 0)


def _measure_all(command: str, settings: list[Setting], repeats: int, method: str, is_portable: bool) -> Result:
    yard, watch = conditions.prepare()
    rows: list[Row] = []
    names: dict[str, str] = {}
    with _progress(len(settings)) as show, _kept_if_stopped(rows, watch):
        done = 0
        for (model, dtype, tokens), group in _by_layers(settings):
            dense = best_dense(NUMPY_DTYPES[dtype])
            names[dtype] = dense.name
            named = f"{model.name}, {dtype}" + (f", {tokens} tokens" if tokens > 1 else "")
            show(f"{named}: making layers", done)
            layers = Layers(model, dtype, dense, first=first_release(), tokens=tokens)
            measure_one = partial(measure, layers, dense=dense, yard=yard, method=method, repeats=repeats)
            rows += watch.undisturbed(partial(_measure_group, group, measure_one, show, done), named)
            done += len(group)
            del layers, measure_one
            cupy().get_default_memory_pool().free_all_blocks()
    name = command + (" --portable" if is_portable else "")
    rows.sort(key=lambda row: [s.label for s in settings].index(row.model))
    return Result(conditions.head(name, method, "; ".join(sorted({*names.values()})), yard, watch), tuple(rows))


@contextmanager
def _kept_if_stopped(rows: list[Row], watch: conditions.Watch) -> Iterator[None]:
    """Ctrl-C ends the measurement, but the groups of settings that are finished by then are a result, which says so."""
    try:
        yield
    except KeyboardInterrupt:
        if not rows:
            raise
        watch.disturbances.append(_STOPPED)


def _measure_group(group: list[Setting], measure_one: Callable[[Setting], list[Row]], show: Show, done: int) -> list[Row]:
    rows: list[Row] = []
    for i, setting in enumerate(group):
        show(f"{setting.label} {setting.dtype} {setting.op} {setting.mask} {setting.sparsity:.2%}", done + i)
        rows += measure_one(setting)
    return rows


def _by_layers(settings: list[Setting]) -> Iterator[tuple[tuple, list[Setting]]]:
    groups: dict[tuple, list[Setting]] = {}
    for setting in settings:
        groups.setdefault((setting.model, setting.dtype, setting.tokens), []).append(setting)
    yield from groups.items()


@contextmanager
def _progress(total: int) -> Iterator[Show]:
    """A bar on a terminal, and nothing where there is none: what is being done, and how many are."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda doing, done: bar.update(task, description=doing, completed=done)
