"""`torch.ops.prosparse.attend`: attention of new tokens over static caches, and its name in Hugging Face transformers.

``attend(q, k, v, keys, values, position, scratch, scale, window)`` stores `k` and `v`, (kv_heads, head_dim), at `position`, an
int64 on the device, in `keys` and `values`, (kv_heads, capacity, head_dim). It returns the attention of `q`, (heads, head_dim),
over the last `window` positions up to there; 0 is all. Where the cache has no such position nothing is stored, and it is NaN.
`scratch` has `Attention.scratch_words` zeros of int32.

For several tokens `q`, `k` and `v` are (sequences, tokens, ..., head_dim), `keys` and `values` (sequences, kv_heads, capacity,
head_dim), and `position`, (sequences,), is that of each sequence's first token; the others follow it. Each token's result has
the bits that it has alone.
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
    several = q.dim() == 4
    leading = ("sequences", "tokens") if several else ()
    named = (("q", q, (*leading, "heads", "head_dim")), ("keys", keys, (*leading[:1], "kv_heads", "capacity", "head_dim")))
    for name, tensor, dims in named:
        if tensor.dim() != len(dims):
            raise ValueError(f"attend: {name} must be ({', '.join(dims)}), got {tuple(tensor.shape)}")
    dtype = str(q.dtype).removeprefix("torch.")
    return Attention(dtype, q.shape[-2], keys.shape[-3], q.shape[-1], *(q.shape[:2] if several else ()))


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
    kernel.launch(stream, overlaps(stream), *pointers, tickets, scale, window, keys.shape[-2])
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
    starts, capacity = position.flatten().tolist(), keys.shape[-2]
    if wrong := [p for p in starts if not 0 <= p <= capacity - attention.tokens]:
        raise ValueError(f"attend: position {wrong[0]} is not in a cache of {capacity}{_for(attention.tokens)}")
    if q.dim() == 2:
        return _of_one(q, k, v, keys, values, starts[0], scale, window)
    out = torch.empty_like(q)
    for s, start in enumerate(starts):
        for t in range(attention.tokens):
            out[s, t] = _of_one(q[s, t], k[s, t], v[s, t], keys[s], values[s], start + t, scale, window)
    return out


def _for(tokens: int) -> str:
    return f" for {tokens} tokens" if tokens > 1 else ""


def _of_one(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, p: int, scale: float, window: int) -> Tensor:
    """The attention of one token at position p."""
    (heads, head_dim), kv_heads = q.shape, keys.shape[0]
    keys[:, p], values[:, p] = k, v
    first = max(0, p + 1 - window) if window else 0
    grouped = q.float().view(kv_heads, heads // kv_heads, head_dim)
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
    leading, capacity = tuple(q.shape[:-2]), keys.shape[-2]
    vector = (*leading, attention.kv_heads, attention.head_dim)
    cache = (*leading[:1], attention.kv_heads, capacity, attention.head_dim)
    wanted = {"q": (*leading, attention.heads, attention.head_dim), "k": vector, "v": vector, "keys": cache, "values": cache}
    for name, tensor in named.items():
        if tuple(tensor.shape) != wanted[name] or not tensor.is_contiguous() or tensor.device != q.device:
            raise ValueError(
                f"attend: {name} must be contiguous, of shape {wanted[name]} and on {q.device}, got {tuple(tensor.shape)} on "
                f"{tensor.device}"
            )
    if not 0 < capacity <= LARGEST_DIMS["d_ff"]:
        raise ValueError(f"attend: a cache of {capacity} positions")
    if position.dtype != torch.int64 or position.numel() != attention.sequences or position.device != q.device:
        positions = "one" if attention.sequences == 1 else attention.sequences
        raise ValueError(f"attend: position must be {positions} int64 on {q.device}, got {position.dtype} on {position.device}")
    if not position.is_contiguous():
        raise ValueError("attend: position must be contiguous")
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
    """What a decoder layer of one step takes for its cache: it hands on the step's own keys and values, which `attend` stores.

    `keys` and `values` are as `attend` takes them, for one token or for `tokens` of each of their sequences.
    """

    def __init__(self, keys: Tensor, values: Tensor, position: Tensor, scratch: Tensor, tokens: int = 1) -> None:
        self.keys, self.values, self.position, self.scratch = keys, values, position, scratch
        self.sequences, self.tokens = position.numel(), tokens

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
    """The attention as transformers' models call it: (sequences, heads, tokens, head_dim), heads and tokens then swapped."""
    if prosparse_cache is None:
        raise NotImplementedError("its attention is not handed the keywords of the model's forward")
    other = [name for name, given in keywords.items() if given is not None and given is not False and name not in _UNDERSTOOD]
    if other:
        raise NotImplementedError(f"its attention has {', '.join(sorted(other))}")
    (sequences, heads, tokens, head_dim), own = query.shape, prosparse_cache
    if value.shape[3] != head_dim:
        raise NotImplementedError("its values have another size than its keys")
    several = own.keys.dim() == 4
    if (sequences, tokens) != (own.sequences, own.tokens):
        raise NotImplementedError(f"it hands {sequences} sequences of {tokens} tokens to its attention")
    given = query, key, value
    out: Tensor = torch.ops.prosparse.attend(
        *(t.transpose(1, 2).contiguous() if several else t.reshape(-1, head_dim) for t in given),
        own.keys,
        own.values,
        own.position,
        own.scratch,
        head_dim**-0.5 if scaling is None else scaling,
        keywords.get("sliding_window") or 0,
    )
    return out.view(sequences, tokens, heads, head_dim), None


@cache
def register_attention() -> None:
    """Give the attention its name in transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend_in_transformers)
