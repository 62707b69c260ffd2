"""Moving NumPy arrays, bfloat16 too, to the array libraries that GPU tests run on, and back."""

from __future__ import annotations

import numpy as np
from checks import DTYPES


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


def vendor_mv(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """``matrix @ vector`` by the vendor's library in the arrays' own dtype: what our error is held against."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    on = OnTorch()
    return on.get(torch.mv(on.put(matrix), on.put(vector)))
