"""Families of MLPs: how to find the modules of each, and which of their parts are which. Pure data: what they compute is tried.

To have one more read, `register_family` a description of it: names of its parts, and of what its config calls the activation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .formula import said_by


@dataclass(frozen=True)
class MLPFamily:
    """Where the parts of a family's MLPs are: names of submodules of one module.

    Parameters
    ----------
    name : str
        For reports.
    up, down : str
        The up- and the down-projection.
    gate : str, optional
        The gate's projection; None where the block has no gate, or its gate is in `fused`.
    fused : str, optional
        One matrix that holds the gate's rows and then those of the up-projection, in the place of `gate` and `up`.
    activation : str
        The activation, which reads the gate or, without one, the up-projection; mostly a module.
    norm : str, optional
        An RMS norm between activation and down-projection.
    classes : tuple of str
        Names of the classes of modules that belong to it; empty for any class with these parts.
    config_keys : tuple of str
        What configs call the activation.
    linears : tuple of str
        Names of classes other than ``torch.nn.Linear`` that its projections may have, which compute what that does.
    is_inside : bool
        Whether the parts belong to a whole decoder layer, which stays: the two projections are replaced by themselves.
    formula : str
        What it computes, for tables.
    models : str
        Models that have it, for tables.
    known : str
        Classes of transformers and others that belong to it, for tables.
    tested : str
        What of it the tests have run, beside a tiny model, for tables.
    measured : str
        What the benchmarks call one of its models, for tables.

    Raises
    ------
    TypeError
        `classes`, `config_keys` or `linears` is no tuple of names.
    ValueError
        No name, no config key, or parts that do not go together: no names, or the same, both `gate` and `fused`, or a gate in a
        layer that stays.
    """

    name: str
    up: str = "up_proj"
    down: str = "down_proj"
    gate: str | None = None
    fused: str | None = None
    activation: str = "act_fn"
    norm: str | None = None
    classes: tuple[str, ...] = ()
    config_keys: tuple[str, ...] = ("hidden_act",)
    linears: tuple[str, ...] = ()
    is_inside: bool = False
    formula: str = ""
    models: str = ""
    known: str = ""
    tested: str = ""
    measured: str = ""

    def __post_init__(self) -> None:
        for name in ("classes", "config_keys", "linears"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(v, str) for v in value):
                fix = "write (name,)" if not isinstance(value, str) else f"write ({value!r:.40},)"
                raise TypeError(f"MLPFamily: {name} must be a tuple of names, of type str, got {value!r:.60}: {fix}")
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"MLPFamily: name must be a str that reports call it by, got {self.name!r:.60}")
        if not self.config_keys:
            raise ValueError(f"MLPFamily: {self.name}: config_keys must name what configs call the activation, got none")
        needed = (self.down, self.activation) if self.fused is not None else (self.up, self.down, self.activation)
        parts = [p for p in (self.gate, self.fused, None if self.fused else self.up, self.down, self.norm) if p is not None]
        for part in (*parts, *needed):
            if not isinstance(part, str) or not part.isidentifier():
                raise ValueError(f"MLPFamily: {self.name}: parts must be names of attributes, got {part!r:.60}")
        if len({*parts, self.activation}) <= len(parts):
            raise ValueError(f"MLPFamily: {self.name}: its parts must have different names, got {', '.join(parts)}")
        if self.gate is not None and self.fused is not None:
            raise ValueError(f"MLPFamily: {self.name}: gate and fused exclude each other, fused holds the gate")
        if self.is_inside and (self.gated or self.norm):
            raise ValueError(f"MLPFamily: {self.name}: inside a layer only blocks without gate and norm are known")

    @property
    def gated(self) -> bool:
        return self.gate is not None or self.fused is not None

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the matrices: those that read x, then the down-projection."""
        first = (self.fused,) if self.fused is not None else tuple(p for p in (self.gate, self.up) if p is not None)
        return (*first, self.down)

    def said(self, config: object) -> tuple[str, Any, Any]:
        """Which key of a config names the activation, its name there and its parameter; None if the config has no such key."""
        for key in self.config_keys:
            activation, parameter = said_by(config, key)
            if activation is not None:
                return key, activation, parameter
        return self.config_keys[0], None, None


LLAMA_LIKE = MLPFamily(
    "LLaMA-like",
    gate="gate_proj",
    formula="gated; ReLU, FATReLU, squared ReLU or dReLU; biases",
    models="ProSparse, ReluLLaMA, MiniCPM-S, TurboSparse, SparseLM",
    known="`LlamaMLP`, `MistralMLP`, `Qwen2MLP`, remote code like them",
    tested="7B, 13B whole; TurboSparse-Mistral's FFN",
    measured="7B",
)
KNOWN: tuple[MLPFamily, ...] = (
    MLPFamily(
        "BitNet",
        gate="gate_proj",
        norm="ffn_sub_norm",
        formula="gated, squared ReLU, norm",
        models="BitNet b1.58 2B4T",
        known="`BitNetMLP`",
        tested="2B's FFN",
        measured="BitNet-2B",
    ),
    LLAMA_LIKE,
    MLPFamily(
        "fused gate and up",
        fused="gate_up_proj",
        activation="activation_fn",
        formula="gated; as LLaMA-like, no biases",
        models="Phi-3 and GLM-4 where their activation is ReLU",
        known="`Phi3MLP`, `Glm4MLP`",
        tested="GLM-4-9B's FFN",
        measured="GLM-4-9B",
    ),
    MLPFamily(
        "Nemotron-H",
        classes=("NemotronHMLP",),
        config_keys=("mlp_hidden_act", "hidden_act"),
        formula="squared ReLU, no gate",
        models="Nemotron-H, Nemotron-3, shared experts too",
        known="`NemotronHMLP`",
        tested="8B's FFN",
        measured="Nemotron-H-8B",
    ),
    MLPFamily(
        "no gate",
        formula="squared ReLU or ReLU, no gate; biases",
        models="AFM-4.5B, Nemotron, Minitron, Jais-2",
        known="`ArceeMLP`, `NemotronMLP`, `Jais2MLP`",
        tested="AFM-4.5B whole; Minitron-4B's FFN",
        measured="AFM-4.5B",
    ),
    MLPFamily(
        "nanochat",
        up="fc1",
        down="fc2",
        activation="activation_fn",
        classes=("NanoChatMLP",),
        formula="squared ReLU, no gate",
        models="nanochat",
        known="`NanoChatMLP`",
        measured="nanochat-d32",
    ),
    MLPFamily(
        "GPT-NeoX-like",
        up="dense_h_to_4h",
        down="dense_4h_to_h",
        activation="act",
        config_keys=("hidden_act", "activation"),
        linears=("FalconLinear",),
        formula="squared ReLU or ReLU, no gate; biases",
        models="Persimmon-8B, Falcon where its activation is ReLU",
        known="`PersimmonMLP`, `FalconMLP`",
        tested="Persimmon-8B's FFN",
        measured="Persimmon-8B",
    ),
    MLPFamily(
        "OPT",
        up="fc1",
        down="fc2",
        activation="activation_fn",
        classes=("OPTDecoderLayer",),
        config_keys=("activation_function",),
        is_inside=True,
        formula="ReLU, no gate; biases",
        models="OPT",
        known="`OPTDecoderLayer`",
        tested="6.7B's FFN",
        measured="OPT-6.7B",
    ),
    MLPFamily(
        "RWKV-7",
        up="key",
        down="value",
        classes=("RWKV7FeedForward",),
        is_inside=True,
        formula="squared ReLU, no gate",
        models="RWKV-7's channel mix, from flash-linear-attention",
        known="`RWKV7FeedForward`",
        measured="RWKV-7-2.9B",
    ),
)
"""Those that come with the package, in the order in which they are asked."""
FAMILIES: list[MLPFamily] = [*KNOWN]
"""Those that are asked: `register_family` adds to them."""


def register_family(family: MLPFamily) -> None:
    """Have `patch_model` and `SparsityMeter` know another family of MLPs, before all that they knew.

    What its modules compute is compared with the formulas in float64 before anything is replaced, as for every family.

    Parameters
    ----------
    family : MLPFamily
        One of the same name is replaced.

    Raises
    ------
    TypeError
        `family` is no `MLPFamily`.
    Examples
    --------
    >>> register_family(MLPFamily("mine", up="w_in", down="w_out", activation="act", classes=("MyMLP",)))
    """
    if not isinstance(family, MLPFamily):
        raise TypeError(f"register_family: expected an MLPFamily, got {type(family).__name__}")
    FAMILIES[:] = [family, *(f for f in FAMILIES if f.name != family.name)]
