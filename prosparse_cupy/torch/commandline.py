"""What the command line does with torch and transformers: load a checkpoint, patch it, let it write, measure its sparsity.

Errors of files, devices and memory become click's here, since only these libraries know what they raise.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from torch import Tensor

from ..packed import MANIFEST
from .activation import register_fatrelu
from .families import mlps
from .generation import generate, prepare_generation
from .linears import CompressedLinear, DecodingLinear
from .loading import load_compressed
from .matrices import groups_of
from .mlp import SparseMLP
from .patch import PatchReport, patch_model, unpatch_model
from .sparsity import measure_sparsity

_FAILURES = (OSError, RuntimeError, ValueError, AssertionError, ImportError, LookupError)
_CONTEXT = 8  # tokens of the prompt that the first new ones are decoded behind, since spaces depend on what is before them
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer makes of bytes that are no character yet


@contextlib.contextmanager
def failing(doing: str, *others: type[Exception]) -> Iterator[None]:
    """A ClickException that says what was being done, for what files, devices, memory and options can do to a call."""
    try:
        yield
    except (BrokenPipeError, click.ClickException):  # click ends quietly when nobody reads on
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise click.ClickException(f"{doing}: out of memory: {_said(error)}") from error
    except Exception as error:
        if not isinstance(error, (*_FAILURES, *others)):
            raise
        raise click.ClickException(f"{doing}: {_said(error)}") from error


def _said(error: Exception) -> str:
    """Its message, behind its type where a message by itself says little."""
    text = str(error).strip()
    says_enough = isinstance(error, (OSError, RuntimeError, ValueError, MemoryError)) and text
    return text if says_enough else f"{type(error).__name__}: {text}".rstrip(": ")


@contextlib.contextmanager
def quiet_transformers(with_bars: bool) -> Iterator[None]:
    """Without transformers' remarks on options, and without its bar of loading where no terminal shows it."""
    logging: Any = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not with_bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def device_of(name: str | None) -> torch.device:
    """The device of this name, by default the GPU if torch sees one; a tensor has been made there."""
    with failing(f"--device {name}"):
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cpu", "cuda"):
            raise click.ClickException(f"--device {name}: expected cpu, cuda or cuda:N")
        torch.zeros(1, device=device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
    return device


def tokenizer_of(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint."""
    auto: Any = transformers.AutoTokenizer
    with failing(f"loading the tokenizer of {folder}", Exception):  # tokenizers raises nothing more special
        return auto.from_pretrained(folder, trust_remote_code=trust_remote_code)


def prompt_ids(tokenizer: Any, prompt: str, chat: bool = False) -> Tensor:
    """A prompt's tokens, (1, tokens); with `chat` those of a user's message and of what comes before the reply."""
    special = not chat
    with failing("reading the prompt", Exception):  # a template is a program, and raises what it likes
        if chat and not getattr(tokenizer, "chat_template", None):
            raise click.ClickException("--chat: this checkpoint's tokenizer has no chat template: leave out --chat")
        if chat:
            message = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        ids: list[int] = tokenizer(prompt, add_special_tokens=special).input_ids
    if not ids:
        raise click.ClickException("the prompt has no tokens: give at least one character")
    return torch.tensor([ids], dtype=torch.int64)


def load(folder: Path, device: torch.device, dtype: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model of a checkpoint, plain or compressed, on a device; `dtype` by default the checkpoint's."""
    register_fatrelu()
    with failing(f"loading {folder}", Exception):  # of a checkpoint's own code too
        if (folder / MANIFEST).is_file():
            if dtype not in (None, "bfloat16"):
                raise click.ClickException(f"{folder} is compressed, so its dtype is bfloat16: leave out --dtype {dtype}")
            return load_compressed(folder, device, trust_remote_code=trust_remote_code)
        auto: Any = transformers.AutoModelForCausalLM
        options = {"dtype": getattr(torch, dtype) if dtype else "auto", "trust_remote_code": trust_remote_code}
        model, found = auto.from_pretrained(folder, output_loading_info=True, **options)
        if missing := sorted(found["missing_keys"]):  # transformers makes numbers up for them
            raise click.ClickException(f"{folder} has no {missing[0]}, and {len(missing) - 1} more weights are missing")
        return model.to(device).eval()


def patched(model: Any, threshold: float | None, compress: bool, dense: bool) -> list[str]:
    """Patch a model as the options say, and say in a few lines what was done."""
    with failing("patching the model"):
        is_packed = any(isinstance(module, CompressedLinear) for module in model.modules())
        if dense:
            unpatch_model(model)
            return []
        if is_packed:
            if threshold is not None:
                raise click.ClickException("--threshold: a compressed checkpoint has its own: take the plain one")
            return ["a compressed checkpoint: " + _kinds(model)]
        if threshold is None and not any(mlps(model)) and not any(groups_of(model)):
            return [f"nothing to patch: a {type(model).__name__} has no projections that are known, so it decodes as it is"]
        return described(patch_model(model, threshold, compress=compress))


def _kinds(model: Any) -> str:
    modules = list(model.modules())
    sparse, packed = (sum(isinstance(m, kind) for m in modules) for kind in (SparseMLP, CompressedLinear))
    return f"{sparse} MLPs decode sparsely, {packed} matrices are in 12 bits"


def described(report: PatchReport) -> list[str]:
    """A report in a few lines; a reason that many layers or matrices share is told once."""
    lines = list[str]()
    if report.layers:
        line = f"{len(report.sparse)} of {len(report.layers)} MLPs decode sparsely"
        if report.sparse:
            line += f", T = {', '.join(f'{t:g}' for t in sorted({x.threshold for x in report.sparse}))}"
        if any(x.ratio < 1 for x in report.sparse):
            line += f", in {sum(x.ratio for x in report.sparse) / len(report.sparse):.1%} of the memory"
        lines += [line, *_counted("dense", [x.reason for x in report.layers if not x.sparse])]
        lines += _counted("found out", [x.note for x in report.sparse])
        lines += _counted("partly plain", [x.plain for x in report.sparse])
    else:
        lines.append("the model has no MLPs of a family that is known, so no FFN is sparse")
    if report.matrices:
        line = f"{len(report.decoding)} of {len(report.matrices)} other matrices decode through ffn_1"
        if packed := sum(m.ratio < 1 for m in report.matrices):
            line += f", {packed} of them in 12 bits"
        lines += [line, *_counted("as before", [m.reason for m in report.matrices if not m.decoding])]
        lines += _counted("in 16 bits", [m.reason for m in report.decoding])
    return lines


def _counted(what: str, reasons: Sequence[str]) -> list[str]:
    return [f"  {number} {what}: {reason}" for reason, number in Counter(filter(None, reasons)).items()]


def how_of(model: Any) -> str:
    """How a model decodes, in a word or two."""
    modules = list(model.modules())
    for kind, how in ((CompressedLinear, "compressed"), (SparseMLP, "sparse"), (DecodingLinear, "dense FFN")):
        if any(isinstance(module, kind) for module in modules):
            return how
    return "dense"


def facts_of(model: Any) -> str:
    """How, in what and where a model decodes."""
    return f"{how_of(model)}, {str(model.dtype).removeprefix('torch.')}, {model.device.type}"


def positions_note(model: Any, length: int) -> list[str]:
    """A line for those who ask for a longer text than the model was made for."""
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return [f"note: the model was made for {most} tokens, prompt included, not {length}"] if most and length > most else []


class TextStream:
    """Hands on the text of new tokens as they come, up to a stop text; it is a streamer for `generate`.

    A character waits for its last byte, and what may be the beginning of a stop text waits for the rest.

    Attributes
    ----------
    tokens : int
        New tokens so far, the end-of-text token included.
    first : float
        When the first of them came, by `time.perf_counter`; 0 before.
    pace : float
        Tokens a second after the first; 0 for fewer than two.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], object], stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._write, self._stops = tokenizer, write, stops
        self._ids: list[int] = []
        self._has_prompt, self._shown, self._behind = False, 0, 0
        self._held, self._is_over = "", False
        self.tokens, self.first, self._last = 0, 0.0, 0.0

    @property
    def pace(self) -> float:
        return (self.tokens - 1) / (self._last - self.first) if self._last > self.first else 0.0

    @property
    def ids(self) -> list[int]:
        """Prompt and new tokens."""
        return self._ids

    def put(self, value: Tensor) -> None:
        """The prompt, then each token."""
        if not self._has_prompt:
            self._has_prompt, self._ids = True, value.flatten().tolist()
            self._shown = len(self._ids)
            self._behind = max(0, self._shown - _CONTEXT)
            return
        self._last = time.perf_counter()
        self.first = self.first or self._last
        self._ids += value.flatten().tolist()
        self.tokens += value.numel()
        new = self._new_text()
        if new and not new.endswith(_UNFINISHED):
            self._behind, self._shown = self._shown, len(self._ids)
            self._hand_on(new)

    def end(self) -> None:
        """Nothing more comes: what was waiting is handed on."""
        new, self._shown = self._new_text(), len(self._ids)
        self._hand_on(new)
        if not self._is_over:
            self._write(self._held)
        self._held = ""

    def stops(self, input_ids: Tensor, _: Any, **__: Any) -> Tensor:
        """A stopping criterion, as transformers calls it: whether there has been a stop text."""
        return torch.full((input_ids.shape[0],), self._is_over, device=input_ids.device)

    def _new_text(self) -> str:
        """What tokens have added since text was handed on, decoded behind tokens before them."""
        decode = self._tokenizer.decode
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        before = decode(self._ids[self._behind : self._shown], **options)
        text: str = decode(self._ids[self._behind :], **options)
        return text[len(before) :]

    def _hand_on(self, new: str) -> None:
        if self._is_over:
            return
        self._held += new
        if ends := [at for stop in self._stops if (at := self._held.find(stop)) >= 0]:
            self._held, self._is_over = self._held[: min(ends)], True
        waiting = 0 if self._is_over else max((_begun(self._held, stop) for stop in self._stops), default=0)
        ready = self._held[: len(self._held) - waiting]
        self._held = self._held[len(ready) :]
        self._write(ready)


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the first ones of a stop text."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def warm_up(model: Any, length: int, prompt_lookup: int | None = None) -> None:
    """Compile and capture the model's step for texts of so many tokens, and the one that verifies so many guesses.

    Where there can be no step, `generate` says why and takes transformers' own loop.
    """
    with failing("preparing the model"), contextlib.suppress(ValueError):
        prepare_generation(model, length, prompt_lookup_num_tokens=prompt_lookup)


def write(model: Any, ids: Tensor, max_new_tokens: int, stream: TextStream, **options: Any) -> None:
    """Let a model go on behind a prompt; `stream` gets the tokens, and `options` are transformers' own."""
    with failing("generating"):
        if int(ids.max()) >= model.get_input_embeddings().num_embeddings:
            raise click.ClickException("generating: the tokenizer has more tokens than the model: they are of two checkpoints")
        ids = ids.to(model.device)
        criteria = transformers.StoppingCriteriaList([stream.stops])
        options = {"attention_mask": torch.ones_like(ids), "stopping_criteria": criteria, **options}
        generate(model, ids, max_new_tokens=max_new_tokens, streamer=stream, **options)


def sparsity_of(model: Any, ids: Sequence[int]) -> float | None:
    """The share of neurons at zero over a text; nothing for a model without known MLPs, or without memory to read it."""
    try:
        text = torch.tensor([list(ids)], dtype=torch.int64, device=model.device)
        return measure_sparsity(model, text, use_cache=False).sparsity
    except (ValueError, MemoryError, torch.OutOfMemoryError):
        return None


def peak_memory(device: torch.device) -> float | None:
    """The most GPU memory that torch has held since `device_of`, in GiB."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def seed(number: int) -> None:
    """Let what is sampled follow from a number."""
    torch.manual_seed(number)


@dataclass(frozen=True)
class Comparison:
    """One text, written by one model before and after it was patched."""

    where: str
    parameters: int
    tokens: int
    text: str
    is_same: bool
    """Whether the dense model wrote it too."""
    dense_pace: float
    sparse_pace: float
    sparsity: float


def compare(folder: Path, on_gpu: bool, prompt: str, tokens: int) -> Comparison:
    """Let the model in a folder write with all its neurons, then without those at zero, in float32."""
    device = device_of("cuda" if on_gpu and torch.cuda.is_available() else "cpu")
    with quiet_transformers(with_bars=False), _one_thread():
        tokenizer, model = tokenizer_of(folder), load(folder, device, "float32")
        ids = prompt_ids(tokenizer, prompt)
        parameters = model.num_parameters()
        dense_text, dense = _timed(model, tokenizer, ids, tokens)
        patched(model, None, compress=False, dense=False)
        text, sparse = _timed(model, tokenizer, ids, tokens)
        sparsity = sparsity_of(model, sparse.ids) or 0.0
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    is_same = dense_text == text
    return Comparison(where, parameters, sparse.tokens, prompt + text, is_same, dense.pace, sparse.pace, sparsity)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """On the CPU: the threads of a model as small as the demo's would wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _timed(model: Any, tokenizer: Any, ids: Tensor, tokens: int) -> tuple[str, TextStream]:
    """The text behind a prompt, and the stream that timed it, once all is compiled."""
    text = list[str]()
    stream = TextStream(tokenizer, text.append)
    warm_up(model, ids.shape[1] + tokens)
    write(model, ids, tokens, stream, do_sample=False)
    return "".join(text), stream
