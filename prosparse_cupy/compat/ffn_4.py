"""`ffn_4` as the first release called it."""

from __future__ import annotations

from typing import Any

from .. import ops
from ._dims import check_dims, check_one_token


def torch_launch_ffn_4(mat: Any, vec: Any, res: Any, mat_row: int, mat_col: int) -> None:
    """Write ``vec @ mat`` into `res`; see `prosparse_cupy.ffn_4`.

    Parameters
    ----------
    mat : array, (mat_row, mat_col)
        The transpose of ``down_proj.weight``, as `prosparse_cupy.pack_down` makes it.
    vec : array, (mat_row,)
        The input, zero where its neuron is inactive.
    res : array, (mat_col,)
        Takes the result.
    mat_row, mat_col : int
        d_ff and d_model, checked against `mat`.

    Raises
    ------
    ValueError
        `mat_row` or `mat_col` disagree with the arrays, or there are several tokens; otherwise as `prosparse_cupy.ffn_4`.
    """
    check_dims("torch_launch_ffn_4", "mat", mat, {"mat_row": mat_row, "mat_col": mat_col})
    check_one_token("torch_launch_ffn_4", "vec", vec, "ffn_4")
    ops.ffn_4(vec, mat, out=res)
