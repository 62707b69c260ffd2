"""Moving NumPy arrays, bfloat16 too, to the array libraries that GPU tests run on, and back."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from checks import DTYPES, weights


class OnNumpy:
    """NumPy arrays, which run the reference."""

    name = "numpy"

    def put(self, array: np.ndarray) -> np.ndarray:
        return array.copy()

    def get(self, array: np.ndarray) -> np.ndarray:
        return array


class OnCupy:
    """CuPy arrays."""

    name = "cupy"

    def put(self, array: np.ndarray):
        import cupy

        return cupy.asarray(array)

    def get(self, array) -> np.ndarray:
        return array.get()


class OnTorch:
    """CUDA torch tensors."""

    name = "torch"

    def put(self, array: np.ndarray):
        import torch

        if array.dtype != DTYPES["bfloat16"]:
            return torch.from_numpy(np.array(array)).cuda()
        return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16).cuda()

    def get(self, tensor) -> np.ndarray:
        import torch

        if tensor.dtype != torch.bfloat16:
            return tensor.cpu().numpy()
        return tensor.cpu().view(torch.int16).numpy().view(DTYPES["bfloat16"])


class Exporter:
    """An array of another library, as far as DLPack shows it."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def vendor_mv(matrix, vector):
    """``matrix @ vector`` of tensors by the vendor's library in their own dtype: what our error is held against."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    return torch.mv(matrix, vector)


def exact_mv(matrix, vector) -> tuple[np.ndarray, np.ndarray]:
    """``matrix @ vector`` of tensors in float64 on the GPU, and the sums of the terms' magnitudes."""
    m, v = matrix.double(), vector.double()
    return (m @ v).cpu().numpy(), (m.abs() @ v.abs()).cpu().numpy()


@lru_cache(maxsize=4)
def large_weights(d_ff: int, d_model: int, dtype: str, seed: int = 0):
    """A signed (d_ff, d_model) tensor."""
    return OnTorch().put(weights(d_ff, d_model, dtype, seed))
