"""The format of results: a head that says where and how, and rows. JSON and CSV in and out."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

VERSION = 1


@dataclass(frozen=True)
class Head:
    """Where, when and how rows were measured."""

    command: str
    gpu: str
    driver: str
    cuda: str
    cupy: str
    torch: str
    dense: str
    """What the dense times were measured with."""
    commit: str
    clean: bool
    """Whether the tree had no uncommitted changes."""
    date: str
    method: str
    read_peak_GBps: float
    launch_us: float
    disturbances: tuple[str, ...] = ()
    """What was seen of other work on the GPU or of a clock that dropped; the rows it met were measured once more."""
    version: int = VERSION


def _derive(row: object, **values: float) -> None:
    """Set fields of a frozen row that follow from its others."""
    for name, value in values.items():
        object.__setattr__(row, name, value)


@dataclass(frozen=True)
class Row:
    """One operator in one setting. Times in µs per call; errors are ‖out - float64‖ / ‖float64‖."""

    op: str
    variant: str
    model: str
    d_model: int
    d_ff: int
    dtype: str
    batch: int
    mask: str
    sparsity: float
    layers: int
    time_us: float
    p10_us: float
    p90_us: float
    dense_us: float
    bytes: int
    floor_us: float
    error: float
    dense_error: float
    checked: bool
    """Whether every output of the very arrays timed was within twice the dense path's error."""
    noisy: bool
    weights: str = "plain"
    """The format of the sparse side's weights, `plain` or `bf12`; the dense path's are plain."""
    ratio: float = field(init=False)
    speedup: float = field(init=False)
    achieved_GBps: float = field(init=False)
    error_ratio: float = field(init=False)

    def __post_init__(self) -> None:
        _derive(
            self,
            ratio=self.time_us / self.floor_us,
            speedup=self.dense_us / self.time_us,
            achieved_GBps=self.bytes / self.time_us * 1e-3,
            error_ratio=self.error / self.dense_error if self.dense_error else math.nan,
        )

    @property
    def key(self) -> tuple[object, ...]:
        """What makes two rows of two results the same measurement."""
        shape = self.d_model, self.d_ff, self.dtype, self.weights, self.batch
        return (self.op, self.variant, self.model, *shape, self.mask, self.sparsity)

    @property
    def setting(self) -> str:
        """What else tells rows of one operator, variant, model and sparsity apart."""
        weights = [] if self.weights == "plain" else [self.weights]
        return ", ".join([self.mask, *weights, *([f"{self.batch} tokens"] if self.batch > 1 else [])])


@dataclass(frozen=True)
class DecodeRow:
    """One model decoding greedily at batch 1: µs per token in the dtype given, and of what.

    Sums by kind of kernel are those of torch's profiler. Errors are the largest of an FFN's, as in `Row`.
    """

    op: str
    variant: str
    model: str
    d_model: int
    d_ff: int
    n_layers: int
    dtype: str
    context: int
    sparsity: float
    """Average over layers and decoded tokens, as measured."""
    time_us: float
    p10_us: float
    p90_us: float
    dense_us: float
    """Of the unpatched model: its compiled step in a CUDA graph, or, beside transformers' generate(), that."""
    error: float
    dense_error: float
    checked: bool
    """Whether every layer's FFN on a decoded token was within twice the dense path's error."""
    noisy: bool
    sparse_ffn_us: float = math.nan
    matrices_us: float = math.nan
    """All other matrices; of an unpatched model, its FFNs' too."""
    attention_us: float = math.nan
    small_us: float = math.nan
    all_reduce_us: float = math.nan
    """Adding the parts of several GPUs, waiting for the slowest among it."""
    floor_us: float = math.nan
    """The bytes that a token must read at the read peak: matrices, of sparse FFNs active rows, keys and values."""
    peak_MiB: float = math.nan
    """Of GPU memory, as torch's allocator counts it."""
    prepare_s: float = math.nan
    """To compile and capture the step: the first of a process pays for the compiler's own start."""
    first_token_ms: float = math.nan
    """Of `generate`, whose time a token has it in it: what a call prepares, the prompt, and the first token."""
    weights: str = "plain"
    """`unpatched`, or patched and `plain` or `bf12`."""
    gpus: int = 1
    """That the model is split over."""
    tokens_per_s: float = field(init=False)
    dense_tokens_per_s: float = field(init=False)
    speedup: float = field(init=False)

    def __post_init__(self) -> None:
        _derive(
            self,
            tokens_per_s=1e6 / self.time_us,
            dense_tokens_per_s=1e6 / self.dense_us,
            speedup=self.dense_us / self.time_us,
        )

    @property
    def key(self) -> tuple[object, ...]:
        """What makes two rows of two results the same measurement."""
        return (
            self.op,
            self.variant,
            self.model,
            self.d_model,
            self.d_ff,
            self.n_layers,
            self.dtype,
            self.weights,
            self.context,
            self.gpus,
        )

    @property
    def setting(self) -> str:
        """What else tells rows of one variant, model and sparsity apart."""
        more = [self.weights] * (self.weights != "plain") + [f"{self.gpus} GPUs"] * (self.gpus > 1)
        return ", ".join([f"context {self.context}", *more])


@dataclass(frozen=True)
class BatchesRow:
    """One model writing greedily for several at once, or with guesses: µs per step, which is one run of the model."""

    op: str
    variant: str
    """`compiled step`, `step`, `generate`, or `lookup 7`: `generate` with so many guesses looked up in the text."""
    model: str
    d_model: int
    d_ff: int
    n_layers: int
    dtype: str
    weights: str
    """`unpatched`, or patched and `plain` or `bf12`."""
    batch: int
    """Sequences."""
    context: int
    """Tokens of the longest sequence; steps are timed on its last ones."""
    sparsity: float
    """Average over layers and the tokens of a prompt, as measured."""
    time_us: float
    p10_us: float
    p90_us: float
    dense_us: float
    """The unpatched model's fastest step at this batch: ours, or the one that torch compiles as a whole if it was asked to."""
    noisy: bool
    checked: bool = True
    """Whether texts that go round are right to the last token, and with guesses are those without."""
    equal: float = 1.0
    """Share of tokens that are those of the sequence alone, or of the text without guesses."""
    tokens_per_step: float = 1.0
    """Of each sequence; the prompt's run counts as a step."""
    accepted: float = math.nan
    """Guesses that were kept, of a step that verified some."""
    prepare_s: float = math.nan
    """To compile and capture the step."""
    tokens_per_s: float = field(init=False)
    """Of all sequences together."""
    dense_tokens_per_s: float = field(init=False)
    speedup: float = field(init=False)

    def __post_init__(self) -> None:
        tokens = self.batch * self.tokens_per_step
        _derive(
            self,
            tokens_per_s=1e6 * tokens / self.time_us,
            dense_tokens_per_s=1e6 * self.batch / self.dense_us,
            speedup=self.tokens_per_step * self.dense_us / self.time_us,
        )

    @property
    def error(self) -> float:
        """Share of tokens that differ."""
        return 1 - self.equal

    @property
    def key(self) -> tuple[object, ...]:
        """What makes two rows of two results the same measurement."""
        dims = self.d_model, self.d_ff, self.n_layers, self.dtype
        return (self.op, self.variant, self.model, *dims, self.weights, self.batch, self.context)

    @property
    def setting(self) -> str:
        """What else tells rows of one variant, model and sparsity apart."""
        return f"{self.weights}, batch {self.batch}"


_ROWS = {"decode": DecodeRow, "batches": BatchesRow, "parallel": DecodeRow}
"""What a command's rows are, where not `Row`."""


@dataclass(frozen=True)
class Result:
    """What one benchmark command found."""

    head: Head
    rows: tuple[Any, ...]
    """`Row`, or one of `_ROWS`."""

    @property
    def failed(self) -> tuple[Any, ...]:
        return tuple(row for row in self.rows if not row.checked)

    def find(self, **wanted: object) -> Any:
        """The one row with these values."""
        found = [row for row in self.rows if all(getattr(row, name) == value for name, value in wanted.items())]
        if len(found) != 1:
            raise LookupError(f"{len(found)} rows with {wanted}")
        return found[0]


def write_json(result: Result, path: Path) -> None:
    """NaN, which JSON has not, is written as null."""
    rows = [{k: None if v != v else v for k, v in asdict(row).items()} for row in result.rows]
    text = json.dumps({"head": asdict(result.head), "rows": rows}, indent=1, allow_nan=False, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def write_csv(result: Result, path: Path) -> None:
    """The rows alone."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [f.name for f in fields(_ROWS.get(result.head.command, Row))])
        table.writeheader()
        table.writerows(asdict(row) for row in result.rows)


def _value(row: dict[str, Any], of: Field[Any]) -> Any:
    """A row's field; results that are older than a field have its default."""
    value = row[of.name] if of.default is MISSING else row.get(of.name, of.default)
    return math.nan if value is None else value


def read_json(path: Path) -> Result:
    """A result of `write_json`; ValueError says what does not fit."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        head = Head(**{**data["head"], "disturbances": tuple(data["head"]["disturbances"])})
        made = _ROWS.get(head.command, Row)
        given = [f for f in fields(made) if f.init]
        rows = tuple(made(**{f.name: _value(row, f) for f in given}) for row in data["rows"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result of these benchmarks: {type(error).__name__}: {error}") from error
    if head.version != VERSION:
        raise ValueError(f"{path} has version {head.version}, this reads {VERSION}: measure it again")
    return Result(head, rows)
