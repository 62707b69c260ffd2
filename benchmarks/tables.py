"""Results as tables: for the terminal and for Markdown."""

from __future__ import annotations

from rich.table import Table

from .paper import PUBLISHED
from .results import Result, Row


def terminal(result: Result) -> Table:
    """All rows, with what the head says above and below."""
    head = result.head
    caption = (
        f"{head.gpu} · {head.method} · commit {head.commit}{'' if head.clean else ' (changed)'} · read peak "
        f"{head.read_peak_GBps / 1e3:.2f} TB/s · launch {head.launch_us:.2f} µs · dense: {head.dense}"
    )
    table = Table(title=head.command, caption=caption)
    for name in ("op", "variant", "model", "dtype", "mask", "sparsity"):
        table.add_column(name)
    for name in ("µs", "p10", "p90", "dense µs", "speed-up", "floor µs", "ratio", "GB/s", "error/dense", "check"):
        table.add_column(name, justify="right")
    for row in result.rows:
        table.add_row(row.op, row.variant, row.model, row.dtype, row.mask, f"{row.sparsity:.2%}", *_numbers(row))
    return table


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


def ffn(result: Result) -> str:
    """Operators and whole FFN of each model."""
    rows = [
        [
            f"`{r.op}`" if " " not in r.op else r.op,
            r.model,
            f"{r.sparsity:.2%}",
            *(f"{us:.1f}" for us in (r.dense_us, r.time_us)),
            f"{r.speedup:.2f}x",
            f"{r.floor_us:.1f}",
            f"{r.ratio:.2f}",
        ]
        for r in result.rows
    ]
    return markdown(["", "model", "sparsity", "dense µs", "µs", "speed-up", "floor µs", "ratio"], rows)


def paper(result: Result) -> str:
    """Measured beside published, steps (2) and (3)."""
    rows = []
    for p in PUBLISHED:
        cells = [p.label, f"{p.sparsity:.2%}"]
        for op, ours_us, dense_us in zip(("ffn_23", "ffn_4"), (p.step_2_us, p.step_3_us), p.dense_us, strict=True):
            row = result.find(op=op, model=p.label)
            cells += [f"{row.dense_us:.1f}", f"{row.time_us:.1f}", f"{row.speedup:.2f}x"]
            cells += [f"{ours_us:.1f}", f"{dense_us / ours_us:.2f}x"]
        rows.append(cells)
    step = ["dense µs", "µs", "speed-up", "published µs", "published speed-up"]
    return markdown(["", "sparsity", *(f"({n}) {s}" for n in (2, 3) for s in step)], rows)
