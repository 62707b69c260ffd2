"""How sparse a model is: the share of active neurons per layer, counted on the device while the model runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..families import MLPFamily
from ._text import table
from .families import check_module, check_tokens, mlps
from .linears import CompressedLinear
from .mlp import SparseMLP, count_active
from .parallel import as_one, is_split, local_of, parallel_of


@dataclass(frozen=True)
class LayerSparsity:
    """One layer, over all tokens counted."""

    name: str
    active: float
    """Average share of neurons that are not zero, 0 to 1; NaN where no token came."""
    tokens: float
    gated: bool = True
    neurons: int = 1
    """d_ff"""
    ranks: tuple[float, ...] = ()
    """The share of active neurons among those of each process, where the layer is split over several."""

    @property
    def sparsity(self) -> float:
        return 1 - self.active


@dataclass(frozen=True)
class SparsityReport:
    """Active shares per layer; `print` shows a table, `save_figure` draws them."""

    layers: tuple[LayerSparsity, ...]

    @property
    def sparsity(self) -> float:
        """Average over the layers that saw a token, 0 to 1; NaN if none did."""
        counted = self._counted
        return sum(layer.sparsity for layer in counted) / len(counted) if counted else math.nan

    @property
    def _counted(self) -> list[LayerSparsity]:
        """Without the layers that no token came to, such as those of a vision tower where a text was read."""
        return [layer for layer in self.layers if layer.tokens]

    @property
    def weights_read(self) -> float:
        """Share of the FFN's weights that decoding must read.

        All of the gate, and two rows of three per active neuron; without a gate all of the up-projection, and one row of two.
        dReLU reads some more: `up_proj` where the gate is active, though its own ReLU makes a zero there. Counted are the
        layers that saw a token; NaN if none did.
        """
        counted = self._counted
        read = sum(x.neurons * ((1 + 2 * x.active) if x.gated else (1 + x.active)) for x in counted)
        return read / sum(x.neurons * (3 if x.gated else 2) for x in counted) if counted else math.nan

    def __str__(self) -> str:
        title = f"average sparsity {self.sparsity:.2%}: decoding reads {self.weights_read:.0%} of the FFN's weights"
        counted = self._counted
        rows = [(x.name, f"{x.active:.2%}", f"{x.sparsity:.2%}", "█" * round(30 * x.active)) for x in counted]
        heads: tuple[str, ...] = ("layer", "active", "sparsity", "")
        if not any(x.ranks for x in counted):
            return table(title, heads, rows)
        by_rank = [" ".join(f"{share:.1%}" for share in x.ranks) for x in counted]
        return table(title, (*heads, "active by rank"), [(*row, more) for row, more in zip(rows, by_rank, strict=True)])

    def save_figure(self, path: str | Path) -> None:
        """Active share by layer, as a picture in the suffix's format (SVG, PNG, ...). Needs matplotlib, extra ``bench``."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 3), layout="constrained")
        axes = figure.add_subplot()
        counted = self._counted
        axes.bar(range(len(counted)), [100 * layer.active for layer in counted], color="#0072b2")
        axes.axhline(100 * (1 - self.sparsity), color="#7a8594", lw=1, label=f"average {1 - self.sparsity:.1%}")
        axes.set(xlabel="layer", ylabel="active neurons, %", ylim=(0, None))
        axes.legend(frameon=False, fontsize=8)
        figure.savefig(path)


def _chosen(model: nn.Module, layers: Collection[str] | None) -> list[tuple[str, Any, MLPFamily]]:
    """The MLPs of a model, or those of these names, all of which there must be."""
    if layers is not None and (isinstance(layers, str) or not isinstance(layers, Collection)):
        raise TypeError(f"SparsityMeter: layers must be a collection of names, got {layers!r:.60}")
    every = list(mlps(model))
    known = [name for name, _, _ in every]
    if not known or (layers is not None and len(layers) == 0):
        among = "" if layers is None else " among no names"
        raise ValueError(f"SparsityMeter: {type(model).__name__} has no MLP of a family that is known{among}")
    if layers is not None and (unknown := sorted({str(name) for name in layers if name not in known})):
        some = ", ".join(known[:3]) + (", ..." if len(known) > 3 else "")
        raise ValueError(f"SparsityMeter: no MLP is named {', '.join(unknown)}; {type(model).__name__} has {some}")
    return [of for of in every if layers is None or of[0] in layers]


class SparsityMeter:
    """Counts active neurons (x1 != 0) of a model's MLPs, patched or not, on the device: no call waits for the GPU.

    Counting costs a few small kernels a layer, and works in CUDA graphs captured while the meter is on. It ends with `remove`,
    or at the end of a ``with`` block.

    Of a model that is split over several processes each counts its own neurons, and `report` is called in all of them: it
    adds the counts, and tells the share of each process, of which the one with the most active neurons sets the pace.

    Parameters
    ----------
    model : torch.nn.Module
        As for `patch_model`, of any activation: SiLU and GELU models simply have no zeros.
    layers : collection of str, optional
        Names of the MLPs to count, as in a report; all of them if it is not said.

    Raises
    ------
    TypeError
        `model` is no module, or `layers` no collection of names.
    ValueError
        No MLP, a name that none has, or another meter counts one of them.

    Examples
    --------
    >>> with SparsityMeter(model) as meter:
    ...     model.generate(**inputs)
    >>> print(meter.report())
    """

    def __init__(self, model: nn.Module, layers: Collection[str] | None = None) -> None:
        check_module("SparsityMeter", model)
        found = _chosen(model, layers)
        if any(getattr(mlp, "counts", None) is not None for _, mlp, _ in found):
            raise ValueError("SparsityMeter: another meter counts this model already: remove() it first")
        self._parallel = parallel_of(model)
        self._counts: dict[str, Tensor] = {}
        self._neurons: dict[str, int] = {}
        self._gated: dict[str, bool] = {}
        self._is_split: dict[str, bool] = {}
        self._undo: list[Callable[[], object]] = []
        try:
            for name, mlp, family in found:
                self._count(name, mlp, family)
        except BaseException:
            self.remove()
            raise

    def _count(self, name: str, mlp: Any, family: MLPFamily) -> None:
        down = getattr(mlp, family.down)
        counts = torch.zeros(2, dtype=torch.int64, device=_device_of(down))
        own = local_of(down.weight).shape[1] if isinstance(down, nn.Linear) else down.in_features
        self._counts[name], self._neurons[name] = counts, own
        self._gated[name] = family.gated
        self._is_split[name] = getattr(mlp, "parallel", None) is not None or is_split(getattr(down, "weight", None))
        mlp.counts = counts
        if isinstance(mlp, SparseMLP):
            self._undo.append(partial(setattr, mlp, "counts", None))
        else:
            self._undo.append(partial(delattr, mlp, "counts"))
            reader = down if family.norm is None else getattr(mlp, family.norm)  # of x1, before a norm's weight
            self._undo.append(reader.register_forward_pre_hook(partial(_count, counts)).remove)

    def report(self) -> SparsityReport:
        """What was counted so far; waits for the GPU, and for the other processes of a model that is split."""
        own = {name: (*counts.tolist(), self._neurons[name]) for name, counts in self._counts.items()}
        told = [own] if self._parallel is None else self._parallel.told(own)
        layers = []
        for name in own:
            of_each = [of[name] for of in told] if self._is_split[name] else [own[name]]
            active, counted, neurons = map(sum, zip(*of_each, strict=True))
            ranks = tuple(_share(*numbers[:2]) for numbers in of_each) if len(of_each) > 1 else ()
            tokens = counted / neurons
            layers.append(LayerSparsity(name, _share(active, counted), tokens, self._gated[name], neurons, ranks))
        return SparsityReport(tuple(layers))

    def reset(self) -> None:
        """Start again from nothing."""
        for counts in self._counts.values():
            counts.zero_()

    def remove(self) -> None:
        """Stop counting; `report` still works."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> SparsityMeter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()


def _share(active: int, neurons: int) -> float:
    return active / neurons if neurons else float("nan")


def _device_of(linear: Any) -> Any:
    return linear.device if isinstance(linear, CompressedLinear) else linear.weight.device


def _count(counts: Tensor, module: nn.Module, arguments: tuple[Any, ...]) -> None:
    count_active(counts, arguments[0].detach())


def measure_sparsity(model: nn.Module, input_ids: Tensor, **keywords: Any) -> SparsityReport:
    """Run the model once over a prompt and report the active share of every layer.

    Parameters
    ----------
    model : torch.nn.Module
        As for `SparsityMeter`.
    input_ids : torch.Tensor, (batch, tokens)
        On the model's device. `keywords` go to the model as well.

    Returns
    -------
    SparsityReport
        ``.sparsity`` is the average that a model card gives; ``.weights_read`` says what decoding would read.

    Raises
    ------
    TypeError, ValueError
        As `SparsityMeter`, or `input_ids` is no tensor of token numbers of this shape.
    """
    with as_one(model):
        check_tokens("measure_sparsity", "input_ids", input_ids, model)
        with SparsityMeter(model) as meter, torch.inference_mode():
            model(input_ids, **keywords)
        return meter.report()
