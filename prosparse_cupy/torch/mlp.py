"""FFNs as modules that decode sparsely: of any family and formula, and the gated one of a LLaMA-like model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..crossover import Weights, most_tokens
from ..families import LLAMA_LIKE, MLPFamily
from ..ffn import SparseFFN, sparse_ffn
from ..formula import DRELU, RELU, Formula
from .activation import FATReLU, activation_of, combined, module_of
from .dispatch import (
    TorchWeight,
    dispatched,
    does_more,
    few_tokens,
    forward_is_torchs,
    is_cast,
    is_recorded,
    is_taken,
    is_watched,
    plain_or_packed,
)
from .linears import CompressedLinear
from .parallel import (
    TensorParallel,
    forward_is_parallel,
    is_split,
    local_of,
    parallel_of_group,
    rows_of,
    set_local,
)

PROJECTIONS = LLAMA_LIKE.projections
_OF_SECOND = ("norm_weight", "norm_eps", "batch_invariant")  # keywords of `sparse_ffn` that `ffn_4` has too


class Operands(NamedTuple):
    """What the operators take of an MLP as it is now."""

    gate: TorchWeight | None
    up: TorchWeight
    down: TorchWeight
    threshold: float
    activation: str
    extras: dict[str, Tensor]
    """Biases and the norm's weight, by the names of `sparse_ffn`'s arguments."""
    norm_eps: float
    batch_invariant: bool

    def keywords(self) -> dict[str, Any]:
        """Of `sparse_ffn`, as far as they are not its defaults."""
        keywords: dict[str, Any] = dict(self.extras)
        if self.activation != RELU:
            keywords["activation"] = self.activation
        if self.norm_eps:
            keywords["norm_eps"] = self.norm_eps
        if not self.batch_invariant:
            keywords["batch_invariant"] = False
        return keywords

    def of_halves(self) -> tuple[str, dict[str, Any], dict[str, Any]]:
        """The operator of the first half, and the keywords of each."""
        second = {name: value for name, value in self.keywords().items() if name in _OF_SECOND}
        if "down_bias" in self.extras:
            second["bias"] = self.extras["down_bias"]
        first: dict[str, Any] = {"activation": self.activation}
        for name in ("gate_bias", "up_bias"):
            if name in self.extras:
                first["bias" if self.gate is None else name] = self.extras[name]
        return "ffn_12" if self.gate is None else "ffn_123", first, second


class Crossover:
    """How many tokens at once a module hands to its sparse operators, before it takes its dense path.

    Attributes
    ----------
    batch_invariant : bool
        As for `sparse_ffn`; True at first. Then up to 8 tokens are sparse, whatever the sparsity.
    """

    batch_invariant: bool = True
    _sparsity: float | None = None
    _paying: Mapping[Weights, int] | None = None
    """What `crossover` says of `_sparsity`: whole numbers, since code is compiled anew for every value that `forward` reads."""

    @property
    def _row(self) -> str:
        """Its name in `crossover`."""
        raise NotImplementedError

    @property
    def _weights(self) -> Weights:
        return "plain"

    @property
    def sparsity(self) -> float | None:
        """Share of neurons at zero, 0 to 1, where it is known, as `patch_model` knows it of an example.

        Without `batch_invariant`, more tokens than pay at this sparsity take the dense path.
        """
        return self._sparsity

    @sparsity.setter
    def sparsity(self, share: float | None) -> None:
        if share is not None and (isinstance(share, bool) or not isinstance(share, Real)):
            raise TypeError(f"sparsity: must be a share of neurons, 0 to 1, or None, got {share!r:.60}")
        if share is not None and not 0 <= share <= 1:
            raise ValueError(f"sparsity: must be a share of neurons, 0 to 1, or None, got {share}")
        self._sparsity = share
        kinds: tuple[Weights, ...] = ("plain", "bf12")
        self._paying = None if share is None else {weights: most_tokens(self._row, weights, share) for weights in kinds}

    @property
    def most_tokens(self) -> int:
        """Up to how many tokens at once go through the sparse operators."""
        if self.batch_invariant or self._paying is None:
            return most_tokens(self._row, self._weights)
        return self._paying[self._weights]


class SparseMLP(Crossover, nn.Module):
    """An FFN of any family: few tokens by the sparse operators, up to 8, more by the dense path.

    Both paths read the same weights: the down-projection's is the transposed view of a contiguous (d_ff, d_model) buffer, so
    that a neuron is one contiguous row, and there is no second copy. Submodules have the names that they have in the family, so
    names and shapes in the state dict are those of the model. `patch_model` makes these.

    Parameters
    ----------
    family : MLPFamily
        Says what the submodules are called.
    formula : Formula
        What the block computes.

    Attributes
    ----------
    parallel : TensorParallel or None
        Whose processes hold the other neurons, where this is a shard: what transformers has split, or what `shard` made.
    batch_invariant : bool
        As for `sparse_ffn`; True at first.
    sparsity : float or None
        Share of neurons at zero, where it is known; see there.
    """

    def __init__(self, family: MLPFamily, formula: Formula) -> None:
        super().__init__()
        self.family = family
        self._rectifies_up = formula.activation == DRELU
        self._names = family.fused, family.gate, family.up, family.down, family.activation, family.norm
        self._norm_kind: type | None = None
        self.counts: Tensor | None = None
        """Active neurons and all neurons so far, (2,) int64, where a `SparsityMeter` counts them."""
        self._replaced: tuple[nn.Module, ...] = ()
        self.parallel: TensorParallel | None = None
        self._is_own_shard = False
        """Whether `shard` made it, so that its projections add nothing up."""
        self._bound: tuple[Any, SparseFFN[Tensor]] | None = None
        """Weights as they were at the last call; they are kept, so no other has the id of one."""
        self._halves: tuple[CompressedLinear, ...] = ()
        """The two parts of a compressed matrix that holds gate and up."""
        self.register_load_state_dict_post_hook(_pack_what_was_loaded)  # type: ignore[no-untyped-call]

    @classmethod
    def of(cls, mlp: nn.Module, family: MLPFamily, formula: Formula, parallel: TensorParallel | None = None) -> SparseMLP:
        """Of an MLP of a family that computes a formula. Its projections and its norm are shared, not copied.

        The down-projection's weight changes its layout in memory, not its values. `parallel` says whose shards these are.
        """
        sparse = cls(family, formula)
        sparse._take_parts(mlp, formula)
        sparse.parallel = parallel
        return sparse

    def shard(self, group: Any) -> SparseMLP:
        """This process's part of the neurons, as a module whose output is that of the whole, for tensor parallelism.

        Every process of the group calls it on the same module, and then the shard on the same input. Of `d_ff` neurons each
        process gets as many, or one more in the first ones. The parts of y are added in float32, and y is rounded once.
        Compressed projections are compressed again. For inference: gradients are refused.

        Parameters
        ----------
        group : torch.distributed.ProcessGroup
            NCCL's for a module on a GPU; ``torch.distributed.group.WORLD`` is that of all processes. A
            mesh of one dim serves too.

        Returns
        -------
        SparseMLP
            With copies of its rows of the weights; biases that all processes need are shared. Its state dict holds this
            process's part.

        Raises
        ------
        ValueError
            More processes than neurons, a norm over all neurons, a shard already, a group that cannot add what is on this
            device, or modules that are not the same in all processes.
        """
        parallel = parallel_of_group(group)
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            return self._shard(parallel)

    @property
    def _device(self) -> torch.device:
        down = self.down
        device: torch.device = down.device if isinstance(down, CompressedLinear) else down.weight.device
        return device

    def _shard(self, parallel: TensorParallel) -> SparseMLP:
        formats = {name: type(getattr(self, name)).__name__ for name in self.family.projections}
        weights = [getattr(self, name).weight for name in (self.family.up, self.family.down) if hasattr(self, name)]
        facts = {"d_model": self.d_model, "d_ff": self.d_ff, "formula": str(self.formula), "formats": formats}
        if reason := parallel.agreed(self._why_no_shard(parallel, weights[-1].device)):
            raise ValueError(f"shard: {reason}")
        parallel.refuse_others("shard", {**facts, "dtype": str(weights[-1].dtype)})
        with parallel.together(), torch.no_grad():
            return self._rows(rows_of(parallel.rank, parallel.size, self.d_ff), parallel)

    def _why_no_shard(self, parallel: TensorParallel, device: torch.device) -> str:
        if self.parallel is not None:
            return "this is a shard already"
        if self.family.norm is not None or self.family.fused is not None:
            return "its norm looks at all neurons" if self.family.norm is not None else "gate and up are one matrix"
        if parallel.size > self.d_ff:
            return f"{parallel.size} processes are more than its {self.d_ff} neurons: use a smaller group"
        return parallel.why_not_on(device)

    def _rows(self, rows: slice, parallel: TensorParallel) -> SparseMLP:
        """A module of some of the neurons."""
        formula = self.formula
        if formula is None:
            raise ValueError("shard: its activation is none that is known")
        part = nn.Module()
        for name in self.family.projections:
            linear: Any = getattr(self, name)
            is_down = name == self.family.down
            if not isinstance(linear, (nn.Linear, CompressedLinear)):
                raise ValueError(f"shard: {name} is a {type(linear).__name__}, whose parts are not known")
            weight = linear.weight.detach()
            kept = weight[:, rows].t().contiguous().t() if is_down else weight[rows].clone()
            bias = linear.bias if is_down or linear.bias is None else nn.Parameter(linear.bias.detach()[rows].clone(), False)
            made: Any
            if isinstance(linear, CompressedLinear):
                made = CompressedLinear(kept, transposed=is_down, bias=bias)
            else:
                made = nn.Linear(kept.shape[1], kept.shape[0], bias=False, device="meta")
                made.weight = nn.Parameter(kept, requires_grad=False)
                made.register_parameter("bias", bias)
            setattr(part, name, made)
        shard = type(self)._of_parts(part, self.family, formula)
        shard._replaced, shard.parallel, shard._is_own_shard = (), parallel, True
        shard.batch_invariant, shard.sparsity = self.batch_invariant, self.sparsity
        return shard.train(self.training)

    @classmethod
    def _of_parts(cls, part: nn.Module, family: MLPFamily, formula: Formula) -> SparseMLP:
        return cls.of(part, family, formula)

    def _take_parts(self, mlp: nn.Module, formula: Formula) -> None:
        for name in self.family.projections:
            setattr(self, name, getattr(mlp, name))
        setattr(self, self.family.activation, module_of(formula))
        if self.family.norm is not None:
            norm = getattr(mlp, self.family.norm)
            setattr(self, self.family.norm, norm)
            self._norm_kind = type(norm)
        for name, value in vars(mlp).items():  # sizes and the config, which code around it may read
            if not name.startswith("_") and name != "forward" and name not in vars(self) and not hasattr(type(self), name):
                setattr(self, name, value)
        self._replaced = (mlp,)
        pack(self.down)
        self.train(mlp.training)

    @property
    def replaced(self) -> nn.Module | None:
        """The module that this one is in the place of; no submodule."""
        return self._replaced[0] if self._replaced else None

    @property
    def down(self) -> Any:
        """The down-projection."""
        return getattr(self, self.family.down)

    @property
    def d_model(self) -> int:
        features: int = self.down.out_features
        return features

    @property
    def d_ff(self) -> int:
        """The number of neurons, of a shard its own."""
        weight = self.down._parameters.get("weight")
        features: int = local_of(weight).shape[1] if is_split(weight) else self.down.in_features
        return features

    @property
    def formula(self) -> Formula | None:
        """What it computes, or None where its activation has been replaced by another."""
        found = activation_of(self._modules.get(self.family.activation))
        if found is None:
            return None
        activation = DRELU if self._rectifies_up else found[0]
        return Formula(found[1], activation, self.family.gated, self.family.norm is not None)

    @property
    def threshold(self) -> float | None:
        """FATReLU's T, or None where the activation has been replaced by something else."""
        found = activation_of(self._modules.get(self.family.activation))
        return None if found is None else found[1]

    def forward(self, x: Any = None, *others: Any, **keywords: Any) -> Any:
        """The FFN of its one argument, (..., d_model), a tensor.

        Few tokens, however they lie in the leading dims, go through the sparse operators (`crossover` says how many), unless
        gradients are recorded or the modules are not those of an FFN that was patched any more: a LoRA adapter, a hook,
        another activation and the like take the dense path, which calls the modules as they are. A call with other arguments
        is that of the module that this one is in the place of, if that knows the threshold.
        """
        if others or keywords or x is None:
            if x is None and len(keywords) == 1 and not others:
                (x,) = keywords.values()
            else:
                return self._as_before(x, *others, **keywords)
        tokens = x.flatten() if x.dim() and x.numel() == x.shape[-1] else few_tokens(x, self.most_tokens)
        if tokens is not None and (y := self._sparse(tokens)) is not None:
            return y.view_as(x)
        x1 = self._first_half(x)
        if self.counts is not None:
            count_active(self.counts, x1)
        *_, down, _, norm = self._names
        if self.parallel is not None and (part := self._part_of(x1)) is not None:
            bias = getattr(self.down, "bias", None)
            return self._sum_of(part, None if bias is None else local_of(bias), x.dtype)
        return getattr(self, down)(x1 if norm is None else getattr(self, norm)(x1))

    def _part_of(self, x1: Tensor) -> Tensor | None:
        """This shard's part of the down-projection by the dense path, in float32 and without a bias.

        None where the module itself adds the parts: with gradients, hooks or an adapter that transformers' projection has.
        """
        down = self.down
        weight: Any = None if isinstance(down, CompressedLinear) else down._parameters.get("weight")
        if is_split(weight):
            recorded = torch.is_grad_enabled() and (x1.requires_grad or weight.requires_grad)
            if recorded or not forward_is_parallel(down):
                return None
            return nn.functional.linear(x1, local_of(weight)).float()
        if not self._is_own_shard and not isinstance(down, CompressedLinear):
            return None
        part: Tensor = down(x1) if getattr(down, "bias", None) is None else nn.functional.linear(x1, down.weight)
        if part.requires_grad:
            raise RuntimeError(f"{type(self).__name__}: a shard is for inference: call it under torch.no_grad()")
        return part.float()

    def _sum_of(self, part: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """y of the parts of all shards: their sum in float32, the bias, and one rounding."""
        assert self.parallel is not None
        total = self.parallel.sum(part)
        return (total if bias is None else total + bias.float()).to(dtype)

    def _as_before(self, x: Any, *others: Any, **keywords: Any) -> Any:
        """A call of the module that this one is in the place of, with the parts of now."""
        if not self._replaced or (self.threshold and self.family.activation not in self._replaced[0]._modules):
            number = (x is not None) + len(others) + len(keywords)
            raise TypeError(f"{type(self).__name__} takes one tensor, got {number} arguments")
        before = copy.copy(self._replaced[0])
        before._modules = {**before._modules, **self._modules}
        return before(*(() if x is None else (x,)), *others, **keywords)

    def _first_half(self, x: Tensor) -> Tensor:
        """Formulas 1 to 3 by calling the modules."""
        fused, gate, up, _, activation, _ = self._names
        act: Any = getattr(self, activation)
        if fused is None and gate is None:
            single: Tensor = act(getattr(self, up)(x))
            return single
        if fused is not None:
            gates, ups = getattr(self, fused)(x).chunk(2, dim=-1)
        else:
            gates, ups = getattr(self, str(gate))(x), getattr(self, up)(x)
        return combined(act, gates, ups, self._rectifies_up)

    @property
    def _row(self) -> str:
        return "sparse_ffn" if self.family.gated else "sparse_ffn without a gate"

    @property
    def _weights(self) -> Weights:
        is_compressed = any(type(self._modules.get(name)) is CompressedLinear for name in self.family.projections)
        return "bf12" if is_compressed else "plain"

    def _sparse(self, tokens: Tensor) -> Tensor | None:
        """Tokens, (d,) or (B, d), by the sparse operators, or None where only calling the modules does what they do."""
        found = self.operands()
        if found is None or is_cast(tokens):
            return None
        tensors = found[:3] if not found.extras else (*found[:3], *found.extras.values())
        if is_recorded(tokens, tensors):
            return None
        if self.parallel is None:
            return self._run(tokens, found)
        bias = found.extras.pop("down_bias", None)
        part = self._run(tokens, found, partial=True)
        return None if part is None else self._sum_of(part, bias, tokens.dtype)

    def partial(self, tokens: Tensor) -> Tensor | None:
        """What of y the neurons of this shard give, in float32 and without `down`'s bias; None where `forward` is dense."""
        found = self.operands()
        if found is None:
            return None
        found.extras.pop("down_bias", None)
        return self._run(tokens, found, partial=True)

    def _run(self, tokens: Tensor, found: Operands, partial: bool = False) -> Tensor | None:
        """The operators, by the shortest way; None where they refuse what they are given."""
        if self.counts is None and tokens.is_cuda and not is_watched():
            try:
                return self._called(tokens, found, partial)  # the dispatcher costs 8 µs
            except (TypeError, ValueError):  # what the operators refuse, the modules do, or refuse as they always did
                return None
        if not is_taken(tokens, *(w for w in found[:3] if w is not None), extras=found.extras.values()):
            return None
        more = {"partial": True} if partial else {}
        if self.counts is None:
            return dispatched("sparse_ffn", tokens, found[:3], found.threshold, **found.keywords(), **more)
        half, first, second = found.of_halves()
        weights = found[:2] if found.gate is not None else (found.up,)
        x1 = dispatched(half, tokens, weights, found.threshold, **first)
        count_active(self.counts, x1)
        return dispatched("ffn_4", x1, (found.down,), **second, **more)

    def _called(self, tokens: Tensor, found: Operands, partial: bool) -> Tensor:
        """The operators themselves. What costs time to look at is bound, so that one call and not each pays for it."""
        out = tokens.new_empty((*tokens.shape[:-1], self.d_model), dtype=torch.float32) if partial else None
        w_gate, w_up, w_down_t = found[:3]
        is_plain = isinstance(w_up, Tensor) and isinstance(w_down_t, Tensor) and (w_gate is None or isinstance(w_gate, Tensor))
        if is_plain and not found.extras:
            call: Any = sparse_ffn
            how = {"activation": found.activation, "batch_invariant": found.batch_invariant}
            plain: Tensor = call(tokens, w_gate, w_up, w_down_t, found.threshold, **how, out=out)
            return plain
        gate: Any = None if w_gate is None else plain_or_packed(w_gate)
        up, down = plain_or_packed(w_up), plain_or_packed(w_down_t)
        more: Any = found.extras
        looked_at = (gate, up, down, *found.extras.values())
        key = (
            found.threshold,
            found.activation,
            found.norm_eps,
            found.batch_invariant,
            tuple(found.extras),
            *((w.data_ptr(), w.dtype) if isinstance(w, Tensor) else id(w) for w in looked_at),
        )
        bound = self._bound
        if bound is None or bound[0] != key:
            ffn: SparseFFN[Tensor] = SparseFFN(
                gate,
                up,
                down,
                found.threshold,
                activation=found.activation,
                norm_eps=found.norm_eps,
                batch_invariant=found.batch_invariant,
                **more,
            )
            bound = self._bound = key, ffn
        return bound[1](tokens, out=out)

    def operands(self) -> Operands | None:
        """What the operators take, if calling the modules does what it did when this one was made."""
        fused, gate, up, down, activation, norm = self._names
        modules: Any = self._modules
        found = activation_of(modules.get(activation))
        if found is None or does_more(modules[activation]) or not forward_is_torchs():
            return None
        extras: dict[str, Tensor] = {}
        w_down = self._weight(down, "down_bias", extras)
        w_gate: TorchWeight | None = None
        w_up: TorchWeight | None
        if fused is not None:
            whole = self._weight(fused, "", extras)
            if whole is None:
                return None
            w_gate, w_up = self._halves_of(whole)
        else:
            if gate is not None:
                w_gate = self._weight(gate, "gate_bias", extras)
                if w_gate is None:
                    return None
            w_up = self._weight(up, "up_bias", extras)
        if w_up is None or w_down is None:
            return None
        norm_eps = 0.0
        if norm is not None:
            module = modules.get(norm)
            known: Any = self._norm_kind
            if not isinstance(module, nn.Module) or type(module) is not known or does_more(module):
                return None
            extras["norm_weight"], norm_eps = modules[norm].weight, eps_of(module)
        kind = DRELU if self._rectifies_up else found[0]
        return Operands(w_gate, w_up, w_down, found[1], kind, extras, norm_eps, self.batch_invariant)

    def _weight(self, name: str, bias_name: str, extras: dict[str, Tensor]) -> TorchWeight | None:
        """The weight of a projection, whose bias goes to `extras`; None if calling it does more than to multiply and add."""
        linear: Any = self._modules.get(name)
        kind, is_down = type(linear), bias_name == "down_bias"
        is_compressed = kind is CompressedLinear
        if is_compressed:
            if linear.transposed != is_down:
                return None
        elif kind is not nn.Linear and not is_plain_linear(linear, self.family):
            return None
        if does_more(linear) and (self.parallel is None or not forward_is_parallel(linear)):
            return None
        parameters = linear._parameters
        bias = parameters.get("bias")
        if bias is not None:
            if not bias_name:
                return None
            extras[bias_name] = bias if self.parallel is None else local_of(bias)
        if is_compressed:
            return linear  # type: ignore[no-any-return]
        weight: Tensor | None = parameters.get("weight")
        if weight is None:
            return None
        if self.parallel is not None:
            if torch.is_grad_enabled() and weight.requires_grad:
                return None
            weight = local_of(weight)
        return weight.mT if is_down else weight

    def _halves_of(self, whole: TorchWeight) -> tuple[TorchWeight, TorchWeight]:
        """Gate and up of a matrix that holds both: rows of it, not copies."""
        d_ff = whole.shape[0] // 2
        if isinstance(whole, Tensor):
            return whole[:d_ff], whole[d_ff:]
        halves = self._halves
        if not halves or halves[0] is not whole:
            halves = self._halves = whole, whole.part(0, d_ff), whole.part(d_ff, 2 * d_ff)
        return halves[1], halves[2]

    def show_one_escape(self) -> None:
        """As `CompressedLinear.show_one_escape`, of the halves of a matrix that holds gate and up."""
        whole: Any = self._modules.get(str(self._names[0]))
        if type(whole) is CompressedLinear:
            self._halves = ()
            for half in self._halves_of(whole):
                half.show_one_escape()  # type: ignore[union-attr]

    def _apply(self, fn: Any, recurse: bool = True) -> SparseMLP:
        self._bound, self._halves = None, ()  # which would keep the memory of before
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bound": None, "_halves": ()}


class SparseGatedMLP(SparseMLP):
    """``down_proj(fatrelu(gate_proj(x)) * up_proj(x))``: the `SparseMLP` of a LLaMA-like model.

    Parameters
    ----------
    d_model, d_ff : int
        The model's width, a multiple of 8 (4 for float32), and the number of neurons.
    threshold : float, default 0.0
        FATReLU's T; 0 is ReLU.
    device, dtype : optional
        As for `torch.nn.Linear`; bfloat16, float16 or float32.
    """

    def __init__(self, d_model: int, d_ff: int, threshold: float = 0.0, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__(LLAMA_LIKE, Formula(threshold))
        linear = partial(nn.Linear, bias=False, device=device, dtype=dtype)
        self.gate_proj, self.up_proj, self.down_proj = linear(d_model, d_ff), linear(d_model, d_ff), linear(d_ff, d_model)
        self.act_fn = FATReLU(threshold)
        pack(self.down_proj)

    @classmethod
    def from_mlp(cls, mlp: Any, threshold: float = 0.0) -> SparseGatedMLP:
        """Of a LLaMA-like MLP: `gate_proj`, `up_proj` and `down_proj`, the activation FATReLU of `threshold`.

        That is what the new module computes, whatever `mlp` does: only `patch_model` compares the two. The three `nn.Linear`
        are shared with `mlp`, not copied; `down_proj.weight` changes its layout in memory, not its values.
        """
        d_ff, d_model = mlp.gate_proj.weight.shape
        sparse = cls(d_model, d_ff, threshold, device="meta")
        sparse._take_parts(mlp, Formula(threshold))
        return sparse

    @classmethod
    def _of_parts(cls, part: nn.Module, family: MLPFamily, formula: Formula) -> SparseMLP:
        return cls.from_mlp(part, formula.threshold)


def is_plain_linear(linear: Any, family: MLPFamily) -> bool:
    """Whether a module is a `torch.nn.Linear` itself, or what the family has in its place."""
    return type(linear) is nn.Linear or (type(linear).__name__ in family.linears and isinstance(linear, nn.Linear))


def rounds_twice(linear: nn.Linear) -> bool:
    """Whether a projection's class may round its product before it adds a bias, as Falcon's does.

    Prefill keeps its bits only if its modules stay what they are, so such a one is not compressed.
    """
    return type(linear) is not nn.Linear and linear.bias is not None


def eps_of(norm: Any) -> float:
    """What an RMS norm adds to the mean of the squares, as its class calls it."""
    for name in ("variance_epsilon", "eps"):
        if hasattr(norm, name):
            value = getattr(norm, name)
            return float(torch.finfo(norm.weight.dtype).eps if value is None else value)
    return 0.0


def _pack_what_was_loaded(module: SparseMLP, incompatible_keys: Any) -> None:
    pack(module.down)


def pack(down_proj: nn.Module) -> None:
    """Lay the weight out so that its transpose is contiguous: the same parameter, shape and values."""
    weight = down_proj._parameters.get("weight") if isinstance(down_proj, nn.Module) else None
    if isinstance(weight, Tensor) and not (local := local_of(weight)).t().is_contiguous():
        set_local(weight, local.detach().t().contiguous().t())


def unpack(down_proj: nn.Module) -> None:
    """The inverse of `pack`: `nn.Linear`'s own layout."""
    weight = down_proj._parameters.get("weight")
    if isinstance(weight, Tensor) and not (local := local_of(weight)).is_contiguous():
        set_local(weight, local.detach().contiguous())


def count_active(counts: Tensor, x1: Tensor) -> None:
    """Add the nonzero elements of `x1` and all of them to `counts`, on the device, without waiting for it."""
    counts[0] += torch.count_nonzero(x1)
    counts[1] += x1.numel()
