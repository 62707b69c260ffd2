"""The generate command: a checkpoint goes on behind a prompt, its text on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import secrets
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

if TYPE_CHECKING:
    from ..torch import commandline

INTERRUPTED = 130  # what shells expect of a command that Ctrl-C ended
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")


@dataclass(frozen=True)
class Options:
    """The command's options, by their names."""

    model: Path
    prompt: str
    chat: bool
    max_new_tokens: int
    do_sample: bool
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    prompt_lookup: int | None
    stop: tuple[str, ...]
    compress: bool
    threshold: float | None
    dense: bool
    dtype: str | None
    device: str | None
    trust_remote_code: bool

    def check(self) -> None:
        """UsageError for options that do not go together."""
        for name in _SAMPLING:
            if getattr(self, name) is not None and not self.do_sample:
                raise click.UsageError(f"--{name.replace('_', '-')} goes with --do-sample")
        if self.prompt_lookup is not None and self.do_sample:
            raise click.UsageError("--prompt-lookup guesses the likeliest tokens: leave out --do-sample")
        if "" in self.stop:
            raise click.UsageError("--stop needs at least one character")
        if self.dense and (self.compress or self.threshold is not None):
            raise click.UsageError("--dense leaves the model as it is: leave out --compress and --threshold")
        if self.compress and self.dtype not in (None, "bfloat16"):
            raise click.UsageError(f"--compress is of bfloat16 alone, not of {self.dtype}")

    @property
    def of_transformers(self) -> dict[str, Any]:
        """What goes to transformers as it is."""
        names = (*_SAMPLING, "repetition_penalty")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.prompt_lookup is not None:
            given["prompt_lookup_num_tokens"] = self.prompt_lookup
        return {"do_sample": self.do_sample, **given}


def torch_part() -> Any:
    """`prosparse_cupy.torch.commandline`, imported when a command needs it."""
    try:
        from ..torch import commandline
    except ImportError as error:
        raise click.ClickException(
            f'this needs torch and transformers: pip install "prosparse-cupy[hf]" brings them ({error})'
        ) from None
    return commandline


def run(options: Options) -> None:
    """The whole command."""
    options.check()
    console = Console(stderr=True)
    try:
        with _status(console, "starting"):
            part = torch_part()
        with part.quiet_transformers(console.is_terminal), _plain_warnings():
            _run(options, part, console)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _run(options: Options, part: Any, console: Console) -> None:
    device = part.device_of(options.device)
    tokenizer = part.tokenizer_of(options.model, options.trust_remote_code)
    ids = part.prompt_ids(tokenizer, options.prompt, options.chat)
    model = part.load(options.model, device, options.dtype, options.trust_remote_code)
    started, length = time.perf_counter(), ids.shape[1] + options.max_new_tokens
    with _status(console, "patching") if not options.compress else contextlib.nullcontext():  # compressing has its own bar
        lines = part.patched(model, options.threshold, options.compress, options.dense)
    for line in (*lines, *part.positions_note(model, length)):
        click.echo(line, err=True)
    part.warm_up(model, length, options.prompt_lookup)
    took, seed = time.perf_counter() - started, secrets.randbits(32) if options.seed is None else options.seed
    part.seed(seed)
    stream, interrupted = _write(options, part, model, tokenizer, ids)
    pieces = _timing(stream, started, took)
    memory = part.peak_memory(device)  # before the text is read at once, which needs more
    sparsity = None if interrupted else part.sparsity_of(model, stream.ids)
    pieces += [f"sparsity {sparsity:.1%}"] if sparsity is not None else []
    pieces += [f"peak {memory:.2f} GiB"] if memory is not None else []
    pieces += [f"seed {seed}"] if options.do_sample else []
    click.echo(f"{'interrupted: ' * interrupted}{', '.join(pieces)} ({part.facts_of(model)})", err=True)
    if interrupted:
        sys.exit(INTERRUPTED)


def _write(options: Options, part: Any, model: Any, tokenizer: Any, ids: Any) -> tuple[commandline.TextStream, bool]:
    """Stream the text; the stream knows tokens and times, also of a text that Ctrl-C ended, which is told."""
    out = _Out()
    stream, interrupted = part.TextStream(tokenizer, out.write, options.stop), False
    try:
        out.write("" if options.chat else options.prompt)
        part.write(model, ids, options.max_new_tokens, stream, **options.of_transformers)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        stream.end()
        out.end_line()
    return stream, interrupted


def _timing(stream: commandline.TextStream, started: float, warm_up: float) -> list[str]:
    pieces = [f"{stream.tokens} token{'s' * (stream.tokens != 1)}"]
    if stream.pace:
        pieces.append(f"{stream.pace:.1f} tokens/s")
    if stream.first:
        pieces.append(f"first token after {stream.first - started:.2f} s ({warm_up:.2f} s of them warm-up)")
    return pieces


class _Out:
    """stdout, every piece of text at once and as it is: click would take escape codes out of it."""

    def __init__(self) -> None:
        self._at_start = True

    def write(self, text: str) -> None:
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()
            self._at_start = text.endswith("\n")

    def end_line(self) -> None:
        if not self._at_start:
            self.write("\n")


def _status(console: Console, doing: str) -> contextlib.AbstractContextManager[object]:
    return console.status(doing) if console.is_terminal else contextlib.nullcontext()


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as one line, without the place in the code that gives them."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        click.echo(f"warning: {message}", err=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
