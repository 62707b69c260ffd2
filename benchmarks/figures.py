"""Results as pictures: SVG that reads on a light and on a dark page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np

from .paper import PUBLISHED
from .results import Result

# A grey with enough contrast on white and on GitHub's dark page, and colours of the Okabe-Ito palette.
_INK = "#7d8590"
_WHERE = ("ffn_1", "ffn_12", "ffn_23", "ffn_4", "SparseFFN")
_COLOURS = {"ffn_23": "#0072b2", "ffn_4": "#d55e00", "SparseFFN": "#009e73", "published": "#9aa4b2", "rest": "#d55e00"}
_STYLE = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _INK,
    "grid.alpha": 0.25,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "prosparse",
}


def speedup(result: Result, model: str, dtype: str = "bfloat16") -> Any:
    """Speed-up against sparsity per operator, and what the byte floor would give."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(7, 4))
        for op in ("ffn_23", "ffn_4", "SparseFFN"):
            wanted = (op, model, dtype, "hot", "prosparse")
            rows = [r for r in result.rows if (r.op, r.model, r.dtype, r.mask, r.variant) == wanted and r.weights == "plain"]
            rows.sort(key=lambda r: r.sparsity)
            sparsity = [100 * r.sparsity for r in rows]
            axes.plot(sparsity, [r.speedup for r in rows], "o-", color=_COLOURS[op], label=op, ms=4)
            floor = [r.dense_us / r.floor_us for r in rows]
            axes.plot(sparsity, floor, "--", color=_COLOURS[op], lw=1, alpha=0.8, label=f"{op} at the byte floor")
        axes.axhline(1, color=_INK, lw=1)
        axes.set(xlabel="sparsity, %", ylabel="speed-up over dense", yscale="log", xlim=(0, 100))
        axes.set_yticks([1, 2, 3, 5, 10, 20, 40], ["1x", "2x", "3x", "5x", "10x", "20x", "40x"])
        axes.minorticks_off()
        axes.set_title(f"{model}, {dtype}, {result.head.gpu}", loc="left", fontsize=10)
        axes.legend(fontsize=8, ncols=2)
        figure.tight_layout()
        return figure


def where_time_goes(result: Result) -> Any:
    """Each operator's time as bytes at the read peak, the launch, and the rest; whole FFNs with compressed weights too."""
    with plt.rc_context(_STYLE):
        ours = [r for r in result.rows if r.op in _WHERE and r.variant == "prosparse"]
        shown = [r for r in ours if r.weights == "plain" or r.op == "SparseFFN"]
        models = {r.model: r.sparsity for r in reversed(shown) if "dims" not in r.model}  # at the first sparsity of each
        rows = [r for r in shown if models.get(r.model) == r.sparsity]
        figure, axes = plt.subplots(figsize=(7, 0.32 * len(rows) + 1.4))
        launch = result.head.launch_us
        labels = [f"{r.op} {r.model}{'' if r.weights == 'plain' else ', 12 bits'}" for r in rows]
        left = np.zeros(len(rows))
        parts = {
            "bytes at the read peak": ("#0072b2", [r.floor_us - launch for r in rows]),
            "one launch": ("#9aa4b2", [launch] * len(rows)),
            "rest": ("#d55e00", [max(0.0, r.time_us - r.floor_us) for r in rows]),
        }
        for label, (colour, widths) in parts.items():
            axes.barh(labels, widths, left=left, color=colour, label=label)
            left += widths
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="time per token and layer, µs")
        axes.set_title(f"Models' own sparsities, {rows[0].dtype}, {result.head.gpu}", loc="left", fontsize=10)
        axes.legend(fontsize=8, loc="upper right")
        figure.tight_layout()
        return figure


def paper(result: Result) -> Any:
    """Speed-ups of the paper's settings, published beside measured."""
    with plt.rc_context(_STYLE):
        figure, both = plt.subplots(2, 1, figsize=(7, 5.2), sharex=True)
        at = np.arange(len(PUBLISHED))
        for step, (op, axes) in enumerate(zip(("ffn_23", "ffn_4"), both, strict=True)):
            published = [p.dense_us[step] / (p.step_2_us, p.step_3_us)[step] for p in PUBLISHED]
            measured = [result.find(op=op, model=p.label, variant="prosparse").speedup for p in PUBLISHED]
            for shift, values, colour, label in (
                (-0.2, published, _COLOURS["published"], "published"),
                (0.2, measured, _COLOURS[op], f"measured, {result.head.gpu}"),
            ):
                bars = axes.bar(at + shift, values, 0.38, color=colour, label=label)
                axes.bar_label(bars, [f"{v:.1f}" for v in values], fontsize=7, color=_INK)
            axes.axhline(1, color=_INK, lw=1)
            axes.grid(axis="x", visible=False)
            axes.set_ylabel(f"{op}:\nspeed-up over dense", fontsize=9)
            axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
        both[1].set_xticks(at, [f"{p.label}\n{p.sparsity:.1%}" for p in PUBLISHED], fontsize=7, rotation=30, ha="right")
        figure.tight_layout()
        return figure


def decode(result: Result) -> Any:
    """Where a token's time goes, by kind of kernel, beside the time that its bytes take; and what calls give."""
    with plt.rc_context(_STYLE):
        rows = [r for r in result.rows if not np.isnan(r.matrices_us)]
        names = {"unpatched": "dense, compiled", "plain": "patched", "bf12": "12 bits"}
        labels = [f"{r.model} {names[r.weights]}" for r in rows]
        figure, axes = plt.subplots(figsize=(7, 0.42 * len(rows) + 1.5))
        left = np.zeros(len(rows))
        kinds = (
            ("sparse FFN", "#0072b2", "sparse_ffn_us"),
            ("other matrices", "#56b4e9", "matrices_us"),
            ("attention", "#e69f00", "attention_us"),
            ("small kernels", "#9aa4b2", "small_us"),
        )
        for label, colour, name in kinds:
            widths = [getattr(r, name) * 1e-3 for r in rows]
            axes.barh(labels, widths, left=left, color=colour, label=label)
            left += widths
        for i, row in enumerate(rows):
            axes.plot([row.floor_us * 1e-3] * 2, [i - 0.4, i + 0.4], color="#d55e00", lw=2, label=None if i else "byte floor")
            axes.text(left[i], i, f" {row.tokens_per_s:.0f} tokens/s", va="center", fontsize=8, color=_INK)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="ms per token", xlim=(0, 1.18 * left.max()))
        axes.set_title(f"One token, context {rows[0].context}, {rows[0].dtype}, {result.head.gpu}", loc="left", fontsize=10)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.42, -0.14), ncols=5)
        figure.tight_layout()
        return figure


def batch(result: Result) -> Any:
    """Time of the whole FFN against the number of tokens: dense, sparse with plain and with compressed weights, and floors."""
    rows = [r for r in result.rows if r.op == "SparseFFN" and r.variant == "prosparse"]
    models, masks = (list(dict.fromkeys(values)) for values in ([r.model for r in rows], [r.mask for r in rows]))
    names = {"hot": "independent masks", "correlated": "correlated masks"}
    with plt.rc_context(_STYLE):
        figure, panels = plt.subplots(len(models), len(masks), figsize=(7, 2.7 * len(models)), squeeze=False, sharey="row")
        for model, line in zip(models, panels, strict=True):
            for mask, axes in zip(masks, line, strict=True):
                for weights, colour, label in (("plain", "#0072b2", "sparse"), ("bf12", "#009e73", "sparse, 12 bits")):
                    # One token is correlated with nothing: its row stands in every panel.
                    shown = [r for r in rows if (r.model, r.weights) == (model, weights) and (r.mask == mask or r.batch == 1)]
                    shown.sort(key=lambda r: r.batch)
                    tokens = [r.batch for r in shown]
                    if weights == "plain":
                        axes.plot(tokens, [r.dense_us for r in shown], "o-", color=_COLOURS["published"], label="dense", ms=4)
                    axes.plot(tokens, [r.time_us for r in shown], "o-", color=colour, label=label, ms=4)
                    floor = [r.floor_us for r in shown]
                    axes.plot(tokens, floor, "--", color=colour, lw=1, alpha=0.8, label=f"{label}, byte floor")
                axes.set_title(f"{model}, {names.get(mask, mask)}", loc="left", fontsize=10)
                axes.set_xscale("log", base=2)
                axes.set_xticks(batches := sorted({r.batch for r in rows}), [str(b) for b in batches])
                axes.minorticks_off()
                axes.set_ylim(bottom=0)
        for axes in panels[:, 0]:
            axes.set_ylabel("FFN, µs")
        for axes in panels[-1]:
            axes.set_xlabel("tokens a call")
        named = f"{rows[0].sparsity:.0%} sparse for each token, {rows[0].dtype}, {result.head.gpu}"
        figure.suptitle(named, x=0.01, ha="left", fontsize=10)
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, fontsize=8, ncols=len(labels), loc="lower center")
        figure.tight_layout(rect=(0, 0.05, 1, 1))
        return figure


def save(figure: Any, path: Path) -> None:
    """As SVG without a date, so that the same result gives the same file."""
    with plt.rc_context(_STYLE):
        figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)
