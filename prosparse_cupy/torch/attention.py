"""`torch.ops.prosparse.attend`: one token's attention over a static cache, and its name in Hugging Face transformers.

``attend(q, k, v, keys, values, position, scratch, scale, window)`` stores `k` and `v`, (kv_heads, head_dim), at `position`, an
int64 on the device, in `keys` and `values`, (kv_heads, capacity, head_dim). It returns the attention of `q`, (heads, head_dim),
over the last `window` positions up to there; 0 is all. Where the cache has no such position nothing is stored, and it is NaN.
`scratch` has `Attention.scratch_words` zeros of int32.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..attention import Attention, attend_kernel
from ..driver import overlaps
from ..formats import VECTOR_BYTES
from ..problem import LARGEST_DIMS

NAME = "prosparse"
"""Of this attention among those of transformers."""

_LIBRARY = torch.library.Library("prosparse", "FRAGMENT")
_SCHEMA = (
    "attend(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor position, Tensor(c!) scratch, "
    "float scale, int window) -> Tensor"
)


def attention_of(q: Tensor, keys: Tensor) -> Attention:
    """The shape of an attention."""
    for name, tensor, dims in (("q", q, ("heads", "head_dim")), ("keys", keys, ("kv_heads", "capacity", "head_dim"))):
        if tensor.dim() != len(dims):
            raise ValueError(f"attend: {name} must be ({', '.join(dims)}), got {tuple(tensor.shape)}")
    return Attention(str(q.dtype).removeprefix("torch."), q.shape[0], keys.shape[0], q.shape[1])


def _on_gpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    scratch: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    attention = attention_of(q, keys)
    _check(attention, q, k, v, keys, values, position, scratch, window)
    device = q.get_device()
    out = torch.empty_like(q)
    stream = torch.cuda.current_stream(device).cuda_stream
    pointers = [tensor.data_ptr() for tensor in (q, k, v, keys, values, position, out, scratch)]
    if any(pointer % VECTOR_BYTES for pointer in pointers[:5]):
        raise ValueError(f"attend: q, k, v, keys and values must start at multiples of {VECTOR_BYTES} bytes")
    tickets = pointers[-1] + 4 * attention.partials
    kernel = attend_kernel(attention, device)
    kernel.launch(stream, overlaps(stream), *pointers, tickets, scale, window, keys.shape[1])
    return out


def _on_host(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    scratch: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    """What the kernel computes, in float32, by torch."""
    attention = attention_of(q, keys)
    _check(attention, q, k, v, keys, values, position, scratch, window)
    p = int(position)
    if not 0 <= p < keys.shape[1]:
        raise ValueError(f"attend: position {p} is not in a cache of {keys.shape[1]}")
    keys[:, p], values[:, p] = k, v
    first = max(0, p + 1 - window) if window else 0
    group = attention.heads // attention.kv_heads
    grouped = q.float().view(attention.kv_heads, group, attention.head_dim)
    weights = (scale * grouped @ keys[:, first : p + 1].float().transpose(1, 2)).softmax(-1)
    return (weights @ values[:, first : p + 1].float()).view_as(q).to(q.dtype)


def _check(
    attention: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    scratch: Tensor,
    window: int,
) -> None:
    """ValueError before anything is launched. Whether the cache has room for `position` is the caller's to know."""
    named = {"q": q, "k": k, "v": v, "keys": keys, "values": values}
    if attention.dtype not in ("bfloat16", "float16", "float32") or any(t.dtype != q.dtype for t in named.values()):
        raise ValueError(f"attend: all must be bfloat16, float16 or float32, got {[str(t.dtype) for t in named.values()]}")
    if attention.misfit:
        raise ValueError(f"attend: {attention.misfit}")
    capacity = keys.shape[1] if keys.dim() == 3 else 0
    vector, cache = (attention.kv_heads, attention.head_dim), (attention.kv_heads, capacity, attention.head_dim)
    wanted = {"q": (attention.heads, attention.head_dim), "k": vector, "v": vector, "keys": cache, "values": cache}
    for name, tensor in named.items():
        if tuple(tensor.shape) != wanted[name] or not tensor.is_contiguous() or tensor.device != q.device:
            raise ValueError(
                f"attend: {name} must be contiguous, of shape {wanted[name]} and on {q.device}, got {tuple(tensor.shape)} on "
                f"{tensor.device}"
            )
    if not 0 < capacity <= LARGEST_DIMS["d_ff"]:
        raise ValueError(f"attend: a cache of {capacity} positions")
    if position.dtype != torch.int64 or position.numel() != 1 or position.device != q.device:
        raise ValueError(f"attend: position must be one int64 on {q.device}, got {position.dtype} on {position.device}")
    if window < 0:
        raise ValueError(f"attend: window must be at least 1, or 0 for all positions, got {window}")
    words = attention.scratch_words
    if scratch.dtype != torch.int32 or scratch.numel() < words or scratch.device != q.device or not scratch.is_contiguous():
        raise ValueError(f"attend: scratch must be {words} int32 on {q.device}, got {scratch.numel()} of {scratch.dtype}")


_LIBRARY.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
_LIBRARY.impl("attend", _on_gpu, "CUDA")
_LIBRARY.impl("attend", _on_host, "CPU")
torch.library.register_fake("prosparse::attend", lambda q, *_: torch.empty_like(q), lib=_LIBRARY)


class LayerCache:
    """What a decoder layer of one step takes for its cache: it hands on the step's own key and value, which `attend` stores."""

    def __init__(self, keys: Tensor, values: Tensor, position: Tensor, scratch: Tensor) -> None:
        self.keys, self.values, self.position, self.scratch = keys, values, position, scratch

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key, value


_UNDERSTOOD = {"sliding_window", "dropout", "is_causal", "position_ids", "use_cache", "cache_position"}


def attend_in_transformers(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    prosparse_cache: LayerCache | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """The attention as transformers' models call it: (1, heads, 1, head_dim) to (1, 1, heads, head_dim)."""
    if prosparse_cache is None:
        raise NotImplementedError("its attention is not handed the keywords of the model's forward")
    other = [name for name, given in keywords.items() if given is not None and given is not False and name not in _UNDERSTOOD]
    if other:
        raise NotImplementedError(f"its attention has {', '.join(sorted(other))}")
    heads, head_dim = query.shape[1], query.shape[3]
    if value.shape[3] != head_dim or query.shape[0] != 1 or query.shape[2] != 1:
        raise NotImplementedError("its values have another size than its keys")
    window, own = keywords.get("sliding_window") or 0, prosparse_cache
    out: Tensor = torch.ops.prosparse.attend(
        query.reshape(heads, head_dim),
        key.reshape(-1, head_dim),
        value.reshape(-1, head_dim),
        own.keys,
        own.values,
        own.position,
        own.scratch,
        head_dim**-0.5 if scaling is None else scaling,
        window,
    )
    return out.view(1, 1, heads, head_dim), None


@cache
def register_attention() -> None:
    """Give the attention its name in transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend_in_transformers)
