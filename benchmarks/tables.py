"""Results as tables: for the terminal and for Markdown."""

from __future__ import annotations

import math
import re
from functools import partial

from rich.table import Table

from prosparse_cupy.families import KNOWN, LLAMA_LIKE
from prosparse_cupy.models import RELU_LLAMA_70B

from .compare import Change
from .paper import PUBLISHED
from .results import BatchesRow, DecodeRow, Result, Row

_MARKED = re.compile(r"(?P<open><!-- table: (?P<name>[\w-]+) -->)\n.*?<!-- end -->", re.DOTALL)


def result_file(name: str) -> str:
    """The committed result that a table is made of: of an H100, if the name tells no other GPU."""
    return f"{'' if name.startswith('h200-') else 'h100-'}{name}.json"


def terminal(result: Result) -> Table:
    """All rows, with what the head says above and below."""
    head = result.head
    if head.command in ("decode", "parallel"):
        return _decode_terminal(result)
    if head.command == "batches":
        return _batches_terminal(result)
    caption = (
        f"{head.gpu} · {head.method} · commit {head.commit}{'' if head.clean else ' (changed)'} · read peak "
        f"{head.read_peak_GBps / 1e3:.2f} TB/s · launch {head.launch_us:.2f} µs · dense: {head.dense}"
    )
    table = Table(title=head.command, caption=caption)
    for name in ("op", "variant", "model", "dtype", "weights", "batch", "mask", "sparsity"):
        table.add_column(name)
    for name in ("µs", "p10", "p90", "dense µs", "speed-up", "floor µs", "ratio", "GB/s", "error/dense", "check"):
        table.add_column(name, justify="right")
    for row in result.rows:
        setting = row.dtype, row.weights, str(row.batch), row.mask, f"{row.sparsity:.2%}"
        table.add_row(row.op, row.variant, row.model, *setting, *_numbers(row))
    return table


def _decode_terminal(result: Result) -> Table:
    head = result.head
    table = Table(title=head.command, caption=f"{head.gpu} · commit {head.commit}{'' if head.clean else ' (changed)'}")
    for name in _DECODE:
        table.add_column(name)
    for row in result.rows:
        table.add_row(*_decode_cells(row), style=None if row.checked else "red")
    return table


_DECODE = (
    "model",
    "how",
    "weights",
    "context",
    "sparsity",
    "tokens/s",
    "over dense",
    "µs: matrices, sparse FFN, attention, small",
    "floor µs",
    "peak GiB",
)


def _decode_cells(row: DecodeRow) -> list[str]:
    def number(value: float, digits: int = 0) -> str:
        return "" if math.isnan(value) else f"{value:.{digits}f}"

    kinds = row.matrices_us, row.sparse_ffn_us, row.attention_us, row.small_us
    return [
        row.model,
        row.variant,
        row.weights,
        str(row.context),
        f"{row.sparsity:.2%}",
        f"{row.tokens_per_s:.1f}{' ~' if row.noisy else ''}",
        f"{row.speedup:.2f}x",
        "" if math.isnan(kinds[0]) else " + ".join(map(number, kinds)),
        number(row.floor_us),
        number(row.peak_MiB / 1024, 1),
    ]


def decode(result: Result) -> str:
    """Tokens a second of whole models."""
    return markdown(list(_DECODE), [_decode_cells(row) for row in result.rows])


def _batches_terminal(result: Result) -> Table:
    head = result.head
    table = Table(title=head.command, caption=f"{head.gpu} · commit {head.commit}{'' if head.clean else ' (changed)'}")
    for name in (
        "model",
        "how",
        "weights",
        "sequences",
        "µs a step",
        "tokens a step",
        "tokens/s",
        "over dense",
        "equal",
        "check",
    ):
        table.add_column(name)
    for row in result.rows:
        setting = row.model, row.variant, row.weights, str(row.batch)
        pace = f"{row.time_us:.0f}{' ~' if row.noisy else ''}", f"{row.tokens_per_step:.2f}", f"{row.tokens_per_s:.1f}"
        check = f"{row.speedup:.2f}x", f"{row.equal:.1%}", "ok" if row.checked else "FAILED"
        table.add_row(*setting, *pace, *check, style=None if row.checked else "red")
    return table


def batches(result: Result) -> str:
    """Tokens a second of whole models by the number of sequences, and of one with guesses."""
    sizes = sorted({r.batch for r in result.rows})
    rows = []
    for model, how, weights in dict.fromkeys((r.model, r.variant, r.weights) for r in result.rows):
        found = {r.batch: r for r in result.rows if (r.model, r.variant, r.weights) == (model, how, weights)}
        one = next(iter(found.values()))
        kept = "" if math.isnan(one.accepted) else f"{one.accepted:.1f}"
        equal = "" if how == "compiled step" else ", ".join(f"{found[size].equal:.0%}" for size in sizes if size in found)
        rows.append([model, how, weights, *(_batches_cell(found.get(size)) for size in sizes), kept, equal])
    headings = [f"{size} sequence{'s' * (size > 1)}: tokens/s, over dense" for size in sizes]
    return markdown(["model", "how", "weights", *headings, "guesses kept", "the same tokens"], rows)


def _batches_cell(row: BatchesRow | None) -> str:
    return "" if row is None else f"{row.tokens_per_s:.1f}{' ~' if row.noisy else ''}, {row.speedup:.2f}x"


def _numbers(row: Row) -> tuple[str, ...]:
    return (
        f"{row.time_us:.2f}{' ~' if row.noisy else ''}",
        f"{row.p10_us:.2f}",
        f"{row.p90_us:.2f}",
        f"{row.dense_us:.2f}",
        f"{row.speedup:.2f}x",
        f"{row.floor_us:.2f}",
        f"{row.ratio:.2f}",
        f"{row.achieved_GBps:.0f}",
        f"{row.error_ratio:.2f}",
        "ok" if row.checked else "FAILED",
    )


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all but the first column to the right."""
    lines = [headings, ["---"] + ["---:"] * (len(headings) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _us(row: Row) -> str:
    """The time, with a mark where its spread, or that of the dense path beside it, is above 5 %."""
    return f"{row.time_us:.1f}{' ~' if row.noisy else ''}"


def _name(row: Row) -> str:
    """The operator, or what stands in for it; `dense` is the dense path in a graph."""
    if row.variant != "prosparse":
        return row.variant if row.op == "SparseFFN" else f"`{row.op}`, {row.variant}"
    name = row.op if " " in row.op else f"`{row.op}`"
    return name if row.weights == "plain" else f"{name}, {row.weights}"


def ffn(result: Result) -> str:
    """Operators and whole FFN of each model."""
    rows = [
        [
            _name(r),
            r.model,
            f"{r.sparsity:.2%}",
            f"{r.dense_us:.1f}",
            _us(r),
            f"{r.speedup:.2f}x",
            f"{r.floor_us:.1f}",
            f"{r.ratio:.2f}",
        ]
        for r in result.rows
    ]
    return markdown(["", "model", "sparsity", "dense µs", "µs", "speed-up", "floor µs", "ratio"], rows)


def paper(result: Result) -> str:
    """Measured beside published."""
    rows = []
    for p in PUBLISHED:
        cells = [p.label, f"{p.sparsity:.2%}"]
        for op, ours_us, dense_us in zip(("ffn_23", "ffn_4"), (p.step_2_us, p.step_3_us), p.dense_us, strict=True):
            row = result.find(op=op, model=p.label, variant="prosparse")
            cells += [f"{row.dense_us:.1f}", _us(row), f"{row.speedup:.2f}x"]
            cells += [f"{ours_us:.1f}", f"{dense_us / ours_us:.2f}x"]
        rows.append(cells)
    step = ["dense µs", "µs", "speed-up", "published µs", "published speed-up"]
    return markdown(["", "sparsity", *(f"`{op}` {s}" for op in ("ffn_23", "ffn_4") for s in step)], rows)


def sweep(
    result: Result,
    dtype: str = "bfloat16",
    ops: tuple[str, ...] = ("ffn_23", "ffn_4", "SparseFFN"),
    weights: tuple[str, ...] = ("plain",),
) -> str:
    """Times and speed-ups over sparsities."""
    models = [m for m in dict.fromkeys(r.model for r in result.rows) if m != "1B"]
    columns = [(m, op, w) for m in models for op in ops for w in weights]
    rows = []
    for sparsity in dict.fromkeys(r.sparsity for r in result.rows):
        found = [
            result.find(op=op, model=m, dtype=dtype, mask="hot", sparsity=sparsity, variant="prosparse", weights=w)
            for m, op, w in columns
        ]
        rows.append([f"{sparsity:.0%}", *(f"{_us(r)} ({r.speedup:.1f}x)" for r in found)])
    return markdown(["sparsity", *(f"{m} `{op}`{'' if w == 'plain' else f', {w}'}" for m, op, w in columns)], rows)


def batch(result: Result) -> str:
    """Times, parts of the floor and speed-ups over the number of tokens."""
    keys = dict.fromkeys((r.model, r.op, r.variant, r.weights, r.mask, r.sparsity) for r in result.rows)
    batches = sorted({r.batch for r in result.rows})
    rows = []
    for model in dict.fromkeys(key[0] for key in keys):
        for key in sorted((key for key in keys if key[0] == model), key=_batch_order):
            found = {r.batch: r for r in result.rows if (r.model, r.op, r.variant, r.weights, r.mask, r.sparsity) == key}
            one, cells = next(iter(found.values())), [_batch_cell(found.get(tokens)) for tokens in batches]
            variant = "" if one.variant == "prosparse" else f", {one.variant}"
            name = f"`{one.op}`{'' if one.weights == 'plain' else f', {one.weights}'}{variant}"
            masks = "independent" if one.mask == "hot" else one.mask
            rows.append([name, model, "any" if one.op == "ffn_1" else f"{masks}, {one.sparsity:.0%}", *cells])
    headings = [f"{tokens} token{'s' * (tokens > 1)}: µs, ratio, speed-up" for tokens in batches]
    return markdown(["", "model", "masks", *headings], rows)


def batch_sparsities(result: Result) -> str:
    """Times and speed-ups over sparsities, for each number of tokens and for what is not batch-invariant."""
    shown = [r for r in result.rows if r.variant in ("prosparse", "tensor cores")]
    columns = sorted({(r.batch, r.variant) for r in shown})
    rows = []
    of_rows = {(r.model, r.op, r.sparsity) for r in shown}
    for model, op, sparsity in sorted(of_rows, key=lambda row: (row[0], row[1] != "SparseFFN", row[2])):
        found = {(r.batch, r.variant): r for r in shown if (r.model, r.op, r.sparsity) == (model, op, sparsity)}
        times = [f"{_us(found[c])} ({found[c].speedup:.2f}x)" for c in columns]
        rows.append([f"{model} `{op}`", f"{sparsity:.0%}", *times])
    headings = [f"{batch} tokens{'' if variant == 'prosparse' else f', {variant}'}" for batch, variant in columns]
    return markdown(["", "sparsity of each token", *headings], rows)


def _batch_order(key: tuple[str, str, str, str, str, float]) -> tuple[object, ...]:
    """Of the rows of a model: by operator, masks, weights, and what is compared last."""
    _, op, variant, weights, mask, sparsity = key
    return op == "SparseFFN", op, sparsity, mask != "hot", weights != "plain", variant != "prosparse"


def _batch_cell(row: Row | None) -> str:
    return "" if row is None else f"{_us(row)}, {row.ratio:.2f}, {row.speedup:.2f}x"


def host(result: Result) -> str:
    """Host time per call by array family."""
    rows = [[f"`{r.op}`", r.variant, _us(r), f"{r.floor_us:.1f}", f"{r.ratio:.1f}", f"{r.dense_us:.0f}"] for r in result.rows]
    return markdown(["", "arrays", "µs on the calling thread", "bare RawKernel", "ratio", "torch eager FFN"], rows)


def summary(results: dict[str, Result]) -> str:
    """The README's five rows, of three results: whole models, one layer's FFN, and that of four tokens at once."""
    rows = []
    for model in ("7B", "13B"):
        row = results["decode"].find(model=model, variant="generate()", weights="bf12")
        pace = (f"{tokens:.1f} tokens/s" for tokens in (row.dense_tokens_per_s, row.tokens_per_s))
        rows.append([f"{model}, whole model, 12 bits", f"{row.sparsity:.2%}", *pace, f"{row.speedup:.2f}x"])
    for model in ("7B", "13B"):
        row = results["ffn"].find(model=model, op="SparseFFN", variant="prosparse", weights="plain")
        times = (f"{us:.1f} µs" for us in (row.dense_us, row.time_us))
        rows.append([f"{model}, one FFN", f"{row.sparsity:.2%}", *times, f"{row.speedup:.2f}x"])
    row = results["batch"].find(model="7B", op="SparseFFN", variant="prosparse", weights="plain", batch=4, mask="hot")
    times = (f"{us:.1f} µs" for us in (row.dense_us, row.time_us))
    rows.append(["7B, one FFN, 4 tokens at once", f"{row.sparsity:.2%}", *times, f"{row.speedup:.2f}x"])
    decode, ffn, batch = (results[name].head for name in ("decode", "ffn", "batch"))
    return (
        f"{markdown(['', 'sparsity', 'dense', 'sparse', 'speed-up'], rows)}\n{decode.gpu}, commits {decode.commit}, "
        f"{ffn.commit} and {batch.commit}, `benchmarks/results/h100-decode.json`, `h100-ffn.json` and `h100-batch.json`\n"
    )


def ffn_short(results: dict[str, Result]) -> str:
    """The operators of the two LLaMAs, plain and in 12 bits: µs, speed-up over dense and ratio to the floor."""
    result, rows = results["ffn"], []
    for model in ("7B", "13B"):
        for op in ("ffn_1", "ffn_23", "ffn_4", "ffn_123", "SparseFFN"):
            found = [result.find(model=model, op=op, variant="prosparse", weights=weights) for weights in ("plain", "bf12")]
            cells = (f"{_us(row)}, {row.speedup:.2f}x, {row.ratio:.2f}" for row in found)
            rows.append([f"`{op}`", model, f"{found[0].dense_us:.1f}", *cells])
    named = f"{result.head.gpu}, commit {result.head.commit}, `benchmarks/results/{result_file('ffn')}`"
    if any(row.noisy for row in result.rows if row.model in ("7B", "13B")):
        named += "; ~: spread above 5 %"
    headings = ["", "model", "dense µs", "plain: µs, speed-up, ratio to the floor", "12 bits: µs, speed-up, ratio to its floor"]
    return f"{markdown(headings, rows)}\n{named}\n"


def _of_family(results: dict[str, Result], model: str, weights: str) -> Row | None:
    """A whole FFN, if it has been measured."""
    for name in ("ffn", "sweep-families-90"):
        for row in results[name].rows:
            is_ours = (row.op, row.variant, row.dtype) == ("SparseFFN", "prosparse", "bfloat16")
            if is_ours and (row.model, row.weights) == (model, weights):
                return row
    return None


def families(results: dict[str, Result]) -> str:
    """Families of MLPs that are patched, and what one FFN of each gains."""
    rows = []
    for family in sorted(KNOWN, key=lambda family: (family != LLAMA_LIKE, not family.measured)):
        plain, packed = (_of_family(results, family.measured, weights) for weights in ("plain", "bf12"))
        gains = ""
        if plain is not None and packed is not None:
            gains = f"{plain.speedup:.2f}x, {packed.speedup:.2f}x at {plain.sparsity:.0%} ({family.measured})"
        tested = f"tiny; {family.tested}" if family.tested else "tiny"
        rows.append([family.models, family.formula, family.known, tested, gains])
    headings = ["models", "formula", "classes", "tested", "one FFN, plain and in 12 bits"]
    table = "\n".join("| " + " | ".join(line) + " |" for line in [headings, ["---"] * len(headings), *rows])
    ffn, families_90 = (results[name].head for name in ("ffn", "sweep-families-90"))
    return (
        f"{table}\n\n{ffn.gpu}, commits {ffn.commit} and {families_90.commit}, `benchmarks/results/{result_file('ffn')}` and "
        f"`{result_file('sweep-families-90')}`\n"
    )


def changes(found: list[Change]) -> Table:
    """What `compare` found."""
    table = Table()
    for name in ("op", "variant", "model", "dtype", "setting", "sparsity"):
        table.add_column(name)
    for name in ("old µs", "new µs", "change", "verdict"):
        table.add_column(name, justify="right")
    for change in found:
        row = change.new
        cells = f"{change.old.time_us:.2f}", f"{row.time_us:.2f}", f"{change.percent:+.1f} %", change.verdict.value
        table.add_row(row.op, row.variant, row.model, row.dtype, row.setting, f"{row.sparsity:.2%}", *cells)
    return table


_SIZE_IN_12_BITS = 0.76  # of plain weights
_ALL_REDUCE_US = 3.0  # that the cost model takes for one: 2.6 on two H100s
_KV_HEADS_OF_70B, _HEAD_SIZE, _VOCABULARY = 8, 128, 32000


def cost_of_70b(results: dict[str, Result]) -> str:
    """A cost model on paper: milliseconds a token of ReluLLaMA-70B over several GPUs, and what one holds and reads."""
    peak = results["decode"].head.read_peak_GBps
    model, heads = RELU_LLAMA_70B, RELU_LLAMA_70B.d_model // _HEAD_SIZE
    attention = 2 * model.d_model**2 * (1 + _KV_HEADS_OF_70B / heads)
    matrix, head = model.d_model * model.d_ff, model.d_model * _VOCABULARY
    held = model.n_layers * (attention + 3 * matrix) + 2 * head
    read = {1.0: model.n_layers * (attention + 3 * matrix) + head}
    read[1 - model.sparsity] = model.n_layers * (attention + (1 + 2 * (1 - model.sparsity)) * matrix) + head
    dense, sparse = read[1.0], read[1 - model.sparsity]
    rows = []
    for gpus in (1, 2, 4, 8):
        added = 2 * model.n_layers * _ALL_REDUCE_US * 1e-3 if gpus > 1 else 0.0
        ways = ((2.0, held, dense), (2.0, held, sparse), (2.0 * _SIZE_IN_12_BITS, held, sparse))
        times = [width * numbers / gpus / peak * 1e-6 + added for width, _, numbers in ways]
        memory = " / ".join(f"{width * numbers / gpus * 1e-9:.0f}" for width, numbers, _ in ways[1:])
        gains = [f"{us:.1f}, {times[0] / us:.2f}x" for us in times[1:]]
        rows.append([str(gpus), memory, f"{times[0]:.1f}", *gains, f"{added:.1f}"])
    heads_of_table = [
        "GPUs",
        "GB on each, plain / 12 bits",
        "dense, ms",
        "sparse plain",
        "sparse in 12 bits",
        "of these all-reduces, ms",
    ]
    return markdown(heads_of_table, rows)


_OF_ALL = {"summary": summary, "ffn-short": ffn_short, "families": families, "cost-70B": cost_of_70b}
"""Tables that are made of several results, or of a part of one."""
TABLES = {
    "ffn": ffn,
    "paper": paper,
    "paper-wallclock": paper,
    "sweep": sweep,
    "sweep-bf12": partial(sweep, weights=("bf12",)),
    "sweep-formulas": partial(sweep, ops=("ffn_4", "SparseFFN"), weights=("plain", "bf12")),
    "sweep-families": partial(sweep, ops=("SparseFFN",), weights=("plain", "bf12")),
    "sweep-families-90": partial(sweep, ops=("SparseFFN",), weights=("plain", "bf12")),
    "h200-ffn": ffn,
    "h200-sweep": partial(sweep, ops=("SparseFFN",), weights=("plain", "bf12")),
    "batch": batch,
    "batch-sparsities-7b": batch_sparsities,
    "batch-sparsities-13b": batch_sparsities,
    "batch-sparsities-bf12": batch_sparsities,
    "batch-sparsities-no-gate": batch_sparsities,
    "host": host,
    "decode": decode,
    "decode-afm": decode,
    "batches": batches,
    "batches-bf12": batches,
}


def fill(text: str, results: dict[str, Result]) -> str:
    """A page with the tables between its markers made anew: ``<!-- table: ffn -->`` to ``<!-- end -->``."""

    def table(match: re.Match[str]) -> str:
        if match["name"] in _OF_ALL:
            made = _OF_ALL[match["name"]](results)
            return f"{match['open']}\n{made}\n<!-- end -->"
        result = results[match["name"]]
        head = result.head
        source = f"{head.gpu}, commit {head.commit}, `benchmarks/results/{result_file(match['name'])}`"
        if any(row.noisy for row in result.rows):
            source += "; ~: spread above 5 %"
        return f"{match['open']}\n{TABLES[match['name']](result)}\n{source}\n\n<!-- end -->"

    return _MARKED.sub(table, text)
