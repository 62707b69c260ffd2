"""Load a ReLU-activated model from disk, patch it, and stream text.

    python examples/generate.py --model tests/data/relu-lm --prompt "def main"

Needs torch and transformers, and a GPU to be fast.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from prosparse_cupy.torch import measure_sparsity, patch_model, register_fatrelu


class Lines(TextStreamer):
    """Shows text line by line, and the number of tokens and the pace on a bar below."""

    def __init__(self, tokenizer, tokens: int, bar: Progress) -> None:
        super().__init__(tokenizer, skip_prompt=False)
        self._bar, self._task = bar, bar.add_task("", total=tokens)
        self._line, self._started, self.tokens, self.seconds = "", 0.0, -1, 0.0

    def put(self, value: torch.Tensor) -> None:
        """The prompt, then a token at a time."""
        self.tokens += 1
        if self.tokens == 1:  # prefill is over
            self._started = time.perf_counter()
        elif self.tokens > 1:
            self.seconds = time.perf_counter() - self._started
        self._bar.update(self._task, completed=max(0, self.tokens), description=f"{self.pace:.1f} tokens/s")
        super().put(value)

    @property
    def pace(self) -> float:
        return (self.tokens - 1) / self.seconds if self.seconds else 0.0

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines + [self._line] * stream_end:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress() -> Iterator[Progress]:
    """A bar on a terminal; elsewhere the text alone."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed} of {task.total} tokens"))
    with Progress(*columns, console=Console(), transient=True, disable=not sys.stdout.isatty()) as bar:
        yield bar


@click.command()
@click.option("--model", "folder", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--prompt", required=True)
@click.option("--max-new-tokens", type=click.IntRange(1), default=200, show_default=True)
@click.option(
    "--threshold", type=click.FloatRange(0), help="FATReLU's T in place of the config's; it changes what the model says."
)
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16", show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--dense", is_flag=True, help="Do not patch, to compare.")
@click.option("--trust-remote-code", is_flag=True, help="Let the checkpoint bring its own model code, and run it.")
def main(
    folder: Path,
    prompt: str,
    max_new_tokens: int,
    threshold: float | None,
    dtype: str,
    device: str,
    dense: bool,
    trust_remote_code: bool,
) -> None:
    """Greedy text from the checkpoint in a folder, decoded sparsely."""
    register_fatrelu()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
        ).to(device)
        if not dense:
            click.echo(patch_model(model.eval(), threshold), err=True)
    # A folder without a model, a file cut short, a device that torch does not have or know.
    except (OSError, ValueError, SafetensorError, RuntimeError, AssertionError) as error:
        raise click.ClickException(str(error)) from error
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
    if inputs.input_ids.shape[1] == 0:
        raise click.ClickException("the prompt has no tokens: give at least one character")
    with progress() as bar, torch.inference_mode():
        lines = Lines(tokenizer, max_new_tokens, bar)
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=lines)
    sparsity = measure_sparsity(model, ids).sparsity
    how = "dense" if dense else "sparse"
    click.echo(
        f"{lines.tokens} tokens, {lines.pace:.1f} tokens/s ({how}, {dtype}, {device}), sparsity {sparsity:.1%}", err=True
    )


if __name__ == "__main__":
    main()
