"""Dimensions, formula and average sparsity of published models whose activation leaves neurons at zero."""

from __future__ import annotations

from dataclasses import dataclass

from .formula import DRELU, RELU, RELU2, Formula


@dataclass(frozen=True)
class Model:
    """One model's FFN.

    `threshold` is FATReLU's T (`hidden_act_param` in the model's config, 0 for plain ReLU); `sparsity` is the average share of
    zero activations, 0 to 1, over layers and tokens, as its authors report it (arXiv 2402.13516, 2406.05955). Models whose
    authors report none have 0.9, what a relative of theirs was measured to have (Nemotron-3, 90.7 %); BitNet's report says
    "more than 80 %".
    """

    name: str
    d_model: int
    d_ff: int
    n_layers: int
    threshold: float
    sparsity: float
    activation: str = RELU
    gated: bool = True
    normed: bool = False
    """Whether there is an RMS norm between activation and down-projection."""

    @property
    def formula(self) -> Formula:
        return Formula(self.threshold, self.activation, self.gated, self.normed)


LLAMA_2_7B = Model("prosparse-llama-2-7b", 4096, 11008, 32, 0.01, 0.8932)
LLAMA_2_13B = Model("prosparse-llama-2-13b", 5120, 13824, 40, 0.01, 0.8880)
RELU_LLAMA_70B = Model("ReluLLaMA-70B", 8192, 28672, 80, 0.0, 0.7156)
"""With the sparsity of ReluLLaMA-13B."""
MINICPM_S_1B = Model("MiniCPM-S-1B-sft", 1536, 3840, 52, 0.03, 0.8789)
MINITRON_4B = Model("Minitron-4B-Base", 3072, 9216, 32, 0.0, 0.9, RELU2, gated=False)
AFM_4_5B = Model("AFM-4.5B", 2560, 18432, 36, 0.0, 0.9, RELU2, gated=False)
BITNET_2B = Model("bitnet-b1.58-2B-4T", 2560, 6912, 30, 0.0, 0.8, RELU2, normed=True)
TURBOSPARSE_MISTRAL = Model("TurboSparse-Mistral", 4096, 14336, 32, 0.0, 0.9, DRELU)
NEMOTRON_H_8B = Model("Nemotron-H-8B", 4096, 21504, 24, 0.0, 0.9, RELU2, gated=False)
GLM_4_9B = Model("GLM-4-9B", 4096, 13696, 40, 0.0, 0.9)
"""As it would be with ReLU; the published one has SiLU."""
PERSIMMON_8B = Model("persimmon-8b-base", 4096, 16384, 36, 0.0, 0.9, RELU2, gated=False)
NANOCHAT_D32 = Model("nanochat-d32", 2048, 8192, 32, 0.0, 0.9, RELU2, gated=False)
RWKV_7_2_9B = Model("RWKV-7-World-2.9B", 2560, 10240, 32, 0.0, 0.9, RELU2, gated=False)
OPT_6_7B = Model("opt-6.7b", 4096, 16384, 32, 0.0, 0.9, gated=False)
