"""`ffn_23` as the first release called it."""

from __future__ import annotations

from typing import Any

from .. import ops
from ._dims import check_dims, check_one_token


def torch_launch_ffn_fuse_23(
    vec_sparse: Any, vec_input: Any, mat_up: Any, res: Any, mat_row: int, mat_col: int, threshold: float = 0.0
) -> None:
    """Write ``fatrelu(vec_sparse, threshold) * (vec_input @ mat_up.T)`` into `res`; see `prosparse_cupy.ffn_23`.

    Parameters
    ----------
    vec_sparse : array, (mat_col,)
        The gate, before or after its activation.
    vec_input : array, (mat_row,)
        The token's hidden state.
    mat_up : array, (mat_col, mat_row)
        ``up_proj.weight``; the first release calls the same memory a column-major (mat_row, mat_col).
    res : array, (mat_col,)
        Takes the result.
    mat_row, mat_col : int
        d_model and d_ff, checked against `mat_up`.
    threshold : float, default 0.0
        FATReLU's T.

    Raises
    ------
    ValueError
        `mat_row` or `mat_col` disagree with the arrays, or there are several tokens; otherwise as `prosparse_cupy.ffn_23`.
    """
    check_dims("torch_launch_ffn_fuse_23", "mat_up", mat_up, {"mat_col": mat_col, "mat_row": mat_row})
    check_one_token("torch_launch_ffn_fuse_23", "vec_input", vec_input, "ffn_23")
    ops.ffn_23(vec_sparse, vec_input, mat_up, threshold, out=res)
