"""The table of the ProSparse paper (arXiv 2402.13516) on the speed of its two operators."""

from __future__ import annotations

from typing import NamedTuple

from prosparse_cupy.models import LLAMA_2_7B, LLAMA_2_13B, Model


class Published(NamedTuple):
    """One setting as published: µs per call. The paper names no GPU for them, and times launch plus synchronise, cache warm."""

    label: str
    model: Model
    sparsity: float
    step_2_us: float
    step_3_us: float

    @property
    def dense_us(self) -> tuple[float, float]:
        return DENSE_US[self.model.name]


DENSE_US = {LLAMA_2_7B.name: (90.55, 82.92), LLAMA_2_13B.name: (131.36, 113.68)}
PUBLISHED = (
    Published("ReluLLaMA-7B", LLAMA_2_7B, 0.6698, 67.12, 63.00),
    Published("Vanilla ReLU-7B", LLAMA_2_7B, 0.6604, 67.85, 63.28),
    Published("Fixed L1-7B", LLAMA_2_7B, 0.9146, 40.99, 54.19),
    Published("ProSparse-7B*", LLAMA_2_7B, 0.8811, 46.66, 55.56),
    Published("ProSparse-7B", LLAMA_2_7B, 0.8932, 45.38, 55.05),
    Published("ReluLLaMA-13B", LLAMA_2_13B, 0.7156, 69.92, 75.47),
    Published("ProSparse-13B*", LLAMA_2_13B, 0.8797, 55.29, 67.50),
    Published("ProSparse-13B", LLAMA_2_13B, 0.8880, 53.78, 66.73),
)
