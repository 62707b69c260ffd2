"""The `prosparse-cupy` command: demo, generate, compress, doctor, warmup, tune."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from .. import __version__, compiler, ffn, measured, models, packed
from ..arguments import MOST_TOKENS
from ..checkpoint import CheckpointError, load_ffn
from ..device import current_device, has_gpu
from ..formats import ITEMSIZE, vector_length
from ..libraries import NUMPY_DTYPES
from ..testing import best_dense
from . import demo, doctor, generate, tune

if TYPE_CHECKING:
    from ..torch import commandline

MODELS = {"7b": models.LLAMA_2_7B, "13b": models.LLAMA_2_13B, "1b": models.MINICPM_S_1B}
_TUNABLE = MODELS | {"minitron-4b": models.MINITRON_4B, "afm-4.5b": models.AFM_4_5B}

_model = click.option("--model", type=click.Choice(list(MODELS)), default="7b", show_default=True, help="Dims of the FFN.")


class _Number(click.FloatRange):
    """A float in a range; NaN is in none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if number != number:
            self.fail("nan is not a number in the range", param, ctx)
        return number


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="prosparse-cupy")
def main() -> None:
    """Exact sparse FFN decoding for ReLU-activated LLMs on NVIDIA GPUs."""


@main.command("demo")
@_model
@click.option("--sparsity", type=_Number(0, 1), help="Share of inactive neurons.  [default: the model's average]")
@click.option("--threshold", type=_Number(0, 1e30), help="FATReLU's T; 0 is ReLU.  [default: the model's]")
@click.option("--dtype", type=click.Choice(list(ITEMSIZE)), help="[default: bfloat16, or the checkpoint's]")
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Take the weights from this Hugging Face safetensors checkpoint instead of random ones.",
)
@click.option("--layer", type=click.IntRange(0), help="Layer of the checkpoint, from 0.  [default: 0]")
def _demo(
    model: str, sparsity: float | None, threshold: float | None, dtype: str | None, checkpoint: Path | None, layer: int | None
) -> None:
    """Run one FFN dense and sparse, check both, and show times, speed-ups and errors.

    In a checkout with torch and transformers, a small trained model then writes a text dense and sparse.
    """
    if layer is not None and checkpoint is None:
        raise click.UsageError("--layer goes with --checkpoint")
    if checkpoint is not None:
        given = click.get_current_context().get_parameter_source("model")
        if sparsity is not None or given is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError("--checkpoint brings its own dims and sparsity: leave out --model and --sparsity")

    console, on_gpu = Console(), has_gpu()
    with console.status("starting") as status:
        progress = status.update
        if checkpoint is not None:
            progress(f"reading layer {layer or 0} of {checkpoint}")
            try:
                weights = load_ffn(checkpoint, layer or 0)
                dtype = dtype or _supported(weights.w_gate.dtype)
            except CheckpointError as error:
                raise click.ClickException(str(error)) from None
            made = demo.checkpoint_layer(weights, NUMPY_DTYPES[dtype], weights.threshold if threshold is None else threshold)
            title = f"{checkpoint.resolve().name}, layer {layer or 0}"
        else:
            chosen, dtype = MODELS[model], dtype or "bfloat16"
            dims = (chosen.d_model, chosen.d_ff) if on_gpu else demo.host_dims(chosen.d_model, chosen.d_ff)
            sparsity = chosen.sparsity if sparsity is None else sparsity
            threshold = chosen.threshold if threshold is None else threshold
            made = demo.random_layer(*dims, NUMPY_DTYPES[dtype], sparsity, threshold, progress)
            title = f"{chosen.name}, random weights"
        run = demo.on_gpu if on_gpu else demo.on_host
        try:
            report = run(made, dtype, progress)
        except (RuntimeError, MemoryError, ValueError) as error:  # ValueError: dims that no kernel supports
            raise click.ClickException(str(error)) from None
    if not on_gpu:
        small = "" if checkpoint is not None else "a smaller layer on "
        console.print(f"No GPU that CuPy can use (see doctor): this is {small}the NumPy reference.", soft_wrap=True)
    _print_report(console, title, made.threshold, report)
    if report.failed:
        raise click.ClickException(f"wrong results: {', '.join(report.failed)}; no time is shown for them")
    if checkpoint is None:
        _demo_text(console, on_gpu)


def _demo_text(console: Console, on_gpu: bool) -> None:
    """The small trained model's part of the demo, or how to get it."""
    console.print()
    folder = demo.small_model()
    if folder is None:
        line = "From a checkout the demo also decodes a text: pip install -e '.[hf]' there, which brings torch too."
        console.print(line, soft_wrap=True, markup=False, highlight=False)
        return
    try:
        with console.status("importing torch and transformers"):
            part = generate.torch_part()
    except click.ClickException as error:
        console.print(f"A text, dense and sparse: {error.message}", soft_wrap=True, markup=False, highlight=False)
        return
    _print_text(console, part.compare(folder, on_gpu, demo.PROMPT, demo.TOKENS))


def _print_text(console: Console, found: commandline.Comparison) -> None:
    if not found.is_same:
        raise click.ClickException("the small model writes another text when it is sparse; no time is shown for it")
    console.print(
        f"relu-lm, trained: {found.parameters / 1e6:.1f} million parameters, float32, T = 0, {found.sparsity:.2%} sparse",
        soft_wrap=True,
    )
    table = Table(title=found.where, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("model", no_wrap=True)
    table.add_column("tokens/s", justify="right", no_wrap=True)
    table.add_column(f"prompt and {found.tokens} tokens", overflow="fold")
    table.add_row("dense", f"{found.dense_pace:.1f}", Text(found.text))
    table.add_row("sparse", f"{found.sparse_pace:.1f}", "the same text")
    console.print(table)
    why = "sparse FFNs run on NumPy here" if found.where == "CPU" else "so small a model waits for launches"
    console.print(f"these numbers show rightness, not speed: {why}", soft_wrap=True)


@main.command("generate")
@click.option(
    "--model", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path), help="The checkpoint's folder."
)
@click.option("--prompt", required=True, help="The text begins with it.")
@click.option("--chat", is_flag=True, help="Put the prompt into the checkpoint's chat template, and print the reply alone.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=200, show_default=True)
@click.option("--do-sample", is_flag=True, help="Draw tokens; without it each token is the likeliest.")
@click.option("--temperature", type=_Number(0, 1e30, min_open=True))
@click.option("--top-k", type=click.IntRange(1))
@click.option("--top-p", type=_Number(0, 1, min_open=True))
@click.option("--min-p", type=_Number(0, 1))
@click.option("--repetition-penalty", type=_Number(0, 1e30, min_open=True))
@click.option(
    "--seed", type=click.IntRange(0, 2**64 - 1), help="The same one draws the same text.  [default: another each time]"
)
@click.option(
    "--prompt-lookup",
    type=click.IntRange(1, 7),
    metavar="N",
    help="Guess N tokens a step, as they followed in the text before: the same text, faster where it repeats itself.",
)
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given several times.")
@click.option("--compress", is_flag=True, help="Hold the weights in 12 bits, without loss; bfloat16 only.")
@click.option(
    "--threshold", type=_Number(0, 1e30), help="FATReLU's T in place of the config's; it changes what the model says."
)
@click.option("--dense", is_flag=True, help="Do not patch, to compare.")
@click.option("--dtype", type=click.Choice(list(ITEMSIZE)), help="[default: the checkpoint's]")
@click.option("--device", help="cpu, cuda or cuda:N.  [default: the GPU if torch sees one]")
@click.option("--trust-remote-code", is_flag=True, help="Let the checkpoint bring its own model code, and run it.")
def _generate(**options: Any) -> None:
    """Let the Hugging Face checkpoint in a folder write, decoded sparsely; text on stdout, all else on stderr.

    Options of sampling mean what they mean in transformers, and default to what the checkpoint says.
    """
    generate.run(generate.Options(**options))


@main.command("tune")
@click.option("--model", type=click.Choice(list(_TUNABLE)), default="7b", show_default=True, help="Dims of the FFN.")
@click.option("--d-model", type=click.IntRange(1), help="Dims of another model, with --d-ff.")
@click.option("--d-ff", type=click.IntRange(1), help="Dims of another model, with --d-model.")
@click.option("--no-gate", is_flag=True, help="Of an FFN without a gate, with --d-model and --d-ff.")
@click.option("--dtype", type=click.Choice(list(ITEMSIZE)), default="bfloat16", show_default=True)
@click.option(
    "--weights", type=click.Choice(["plain", "bf12"]), default="plain", show_default=True, help="bf12: compressed ones."
)
@click.option("--tokens", type=click.IntRange(1, MOST_TOKENS), default=1, show_default=True, help="Of a call.")
@click.option("--sparsity", type=_Number(0, 1), help="Share of inactive neurons.  [default: the model's average]")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the table here.  [default: the user's own, which is used from then on]",
)
def _tune(
    model: str,
    d_model: int | None,
    d_ff: int | None,
    no_gate: bool,
    dtype: str,
    weights: str,
    tokens: int,
    sparsity: float | None,
    output: Path | None,
) -> None:
    """Time launches of the kernels on this GPU and keep the fastest that lose nowhere. Results do not change by a bit."""
    given = click.get_current_context().get_parameter_source("model")
    if (d_model is None) != (d_ff is None):
        raise click.UsageError("--d-model and --d-ff go together")
    if d_model is not None and given is click.core.ParameterSource.COMMANDLINE:
        raise click.UsageError("--model brings its own dims: leave out --d-model and --d-ff")
    if no_gate and d_model is None:
        raise click.UsageError("--no-gate goes with --d-model and --d-ff: models are known to have a gate or not")
    if weights == "bf12" and dtype != "bfloat16":
        raise click.UsageError(f"--weights bf12 is of bfloat16 alone, not of {dtype}")
    chosen = _TUNABLE[model]
    if d_model is not None and d_ff is not None:
        chosen = models.Model(f"{d_model} x {d_ff}", d_model, d_ff, 1, 0.01, 0.9, gated=not no_gate)
    if chosen.d_model % vector_length(dtype):
        raise click.UsageError(f"--d-model must be a multiple of {vector_length(dtype)} for {dtype}, got {chosen.d_model}")
    if sparsity is not None:
        chosen = dataclasses.replace(chosen, sparsity=sparsity)
    console, commit = Console(), os.environ.get("PROSPARSE_COMMIT", __version__)
    try:
        target = compiler.target_of(current_device())
        file = output or measured.user_folder() / measured.file_name(target)
        with _bar(Console(stderr=True)) as tell:
            found = tune.tune(chosen, dtype, best_dense(NUMPY_DTYPES[dtype]), commit, tell, weights, tokens)
        measured.write(file, target, found)
    except (ImportError, RuntimeError, OSError, MemoryError) as error:  # CuPy's OutOfMemoryError is a MemoryError
        raise click.ClickException(str(error)) from None
    what = f"{chosen.name}, {dtype}, {weights} weights, {tokens} token{'s' * (tokens > 1)}, {chosen.sparsity:.2%} sparse"
    table = Table(title=f"{target.name}: {what}", title_justify="left")
    for column in ("kernel", "rule µs", "fastest µs", "knobs"):
        table.add_column(column, justify="left" if column in ("kernel", "knobs") else "right", overflow="fold")
    for row in found:
        knobs = " ".join(f"{name}={value}" for name, value in row.knobs.as_dict().items())
        table.add_row(row.problem.kernel, f"{row.rule_us:.2f}", f"{row.us:.2f}", knobs)
    console.print(table)
    console.print(f"written to {file}", soft_wrap=True, highlight=False)


@main.command("compress")
@click.argument("checkpoint", type=click.Path(file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
def _compress(checkpoint: Path, out: Path) -> None:
    """Write the Hugging Face CHECKPOINT to the folder OUT, its matrices in 12 bits, without loss.

    prosparse_cupy.torch.load_compressed(OUT) loads it.
    """
    try:
        with _bar(Console(stderr=True)) as tell:
            done = packed.compress_checkpoint(checkpoint, out, tell)
    except (CheckpointError, MemoryError, RuntimeError) as error:
        raise click.ClickException(str(error)) from None
    console = Console()
    for name, why in done.plain.items():
        console.print(f"{name} stays plain: {why}", soft_wrap=True, highlight=False)
    before, after = done.bytes_before / 2**30, done.bytes_after / 2**30
    console.print(
        f"{done.compressed} matrices compressed: {before:.2f} GiB became {after:.2f} ({after / before:.1%}). Written to {out}.",
        soft_wrap=True,
        highlight=False,
    )


@contextmanager
def _bar(console: Console) -> Iterator[tune.Tell]:
    """A progress bar on a terminal, and nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("making layers")
        yield lambda doing, done, total: bar.update(task, description=doing, completed=done, total=total)


def _supported(dtype: np.dtype) -> str:
    name = str(dtype)
    if name not in ITEMSIZE:
        raise CheckpointError(f"the checkpoint's weights are {name}: choose one of {', '.join(ITEMSIZE)} with --dtype")
    return name


def _print_report(console: Console, title: str, threshold: float, report: demo.Report) -> None:
    console.print(
        f"{title}: d_model {report.d_model}, d_ff {report.d_ff}, {report.dtype}, T = {threshold:g}, "
        f"{report.sparsity:.2%} sparse",
        soft_wrap=True,
    )
    table = Table(title=report.where, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("operator", no_wrap=True)
    table.add_column("", no_wrap=True)
    for column in ("dense µs", "sparse µs", "speed-up", "dense err.", "sparse err."):
        table.add_column(column, justify="right", no_wrap=True)
    for row in report.rows:
        right = row.operator not in report.failed
        times = (f"{row.dense_us:.1f}", f"{row.sparse_us:.1f}", f"{row.speedup:.2f}x") if right else ("-", "-", "[red]wrong[/]")
        table.add_row(row.operator, demo.WHAT[row.operator], *times, f"{row.dense_error:.1e}", f"{row.sparse_error:.1e}")
    console.print(table)
    copies = f" in a CUDA graph of {report.layers} layers, cold L2" if report.layers > 1 else ""
    console.print(f"dense: {report.dense}; err.: ‖out - float64‖ / ‖float64‖", soft_wrap=True)
    console.print(f"times: median, dense and sparse in turns{copies}, ± {report.resolution / 2:.0%}", soft_wrap=True)


@main.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def _doctor(as_json: bool) -> None:
    """Show what the kernels depend on, and flag what is wrong with the command that fixes it."""
    facts = doctor.collect()
    problems = doctor.diagnose(facts)
    if as_json:
        found = [{"what": p.what, "fix": p.fix} for p in problems]
        click.echo(json.dumps({**facts.as_dict(), "problems": found}, indent=2))
    else:
        _print_facts(Console(), facts, problems)
    sys.exit(1 if problems else 0)


def _print_facts(console: Console, facts: doctor.Facts, problems: list[doctor.Problem]) -> None:
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in doctor.describe(facts):
        table.add_row(name, value)
    console.print(table)
    for problem in problems:
        console.print(f"[red]problem[/] {problem.what}", highlight=False)
        console.print(f"    fix {problem.fix}", highlight=False, markup=False)
    if not problems:
        console.print("[green]all good[/]")


@main.command("warmup")
@_model
@click.option("--dtype", type=click.Choice(list(ITEMSIZE)), default="bfloat16", show_default=True)
@click.option("--compressed", is_flag=True, help="The kernels for weights in 12 bits; bfloat16 only.")
def _warmup(model: str, dtype: str, compressed: bool) -> None:
    """Compile every kernel of a model's dims into CuPy's disk cache."""
    chosen, console = MODELS[model], Console()
    try:
        with console.status(f"compiling for {chosen.name}"):
            report = ffn.warmup(chosen.d_model, chosen.d_ff, dtype=dtype, compressed=compressed)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    except (ImportError, RuntimeError) as error:
        raise click.ClickException(str(error)) from None
    table = Table(title=f"{chosen.name}, {dtype}, sm_{report[0].capability}", title_justify="left")
    for column in ("kernel", "defines"):
        table.add_column(column)
    table.add_column("ms", justify="right")
    for kernel in report:
        table.add_row(kernel.kernel, kernel.defines, f"{kernel.seconds * 1e3:.0f}")
    console.print(table)
    console.print(f"{sum(kernel.seconds for kernel in report):.2f} s in all; what was in the cache is loaded, not compiled")
