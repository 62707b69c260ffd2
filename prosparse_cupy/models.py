"""Dimensions, FATReLU threshold and average sparsity of published ReLU-activated models."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """One model's FFN.

    `threshold` is FATReLU's T (`hidden_act_param` in the model's config, 0 for plain ReLU); `sparsity` is the average share of
    zero activations, 0 to 1, over layers and tokens, as its authors report it (arXiv 2402.13516).
    """

    name: str
    d_model: int
    d_ff: int
    n_layers: int
    threshold: float
    sparsity: float


LLAMA_2_7B = Model("prosparse-llama-2-7b", 4096, 11008, 32, 0.01, 0.8932)
LLAMA_2_13B = Model("prosparse-llama-2-13b", 5120, 13824, 40, 0.01, 0.8880)
MINICPM_S_1B = Model("MiniCPM-S-1B-sft", 1536, 3840, 52, 0.03, 0.8789)
