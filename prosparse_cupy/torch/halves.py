"""The two halves of an FFN whose projections belong to a module that does more and stays, as OPT's decoder layers do."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..families import MLPFamily
from ..ops import ffn_4, ffn_12
from .activation import FATReLU
from .dispatch import dispatched, does_more, few_tokens, forward_is_torchs, is_cast, is_recorded, is_taken, is_watched
from .mlp import Crossover, pack


class _Half(Crossover, nn.Linear):
    """A projection that shares the parameters of the `nn.Linear` that it is in the place of."""

    _operator: str = ""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self._replaced: tuple[nn.Linear, ...] = (linear,)
        self.train(linear.training)

    def linear(self) -> nn.Linear:
        """What this one is in the place of, with the parameters of now."""
        linear = self._replaced[0]
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)

    @property
    def _row(self) -> str:
        return self._operator

    def _by_operator(self, operator: Any, x: Tensor, weight: Tensor, *threshold: float) -> Tensor | None:
        """Few tokens by an operator, or None where there are more or only torch does what is asked."""
        shape, name = x.shape, self._operator
        tokens = x.flatten() if x.numel() == shape[-1] else few_tokens(x, self.most_tokens)
        if tokens is None:
            return None
        extras = () if self.bias is None else (self.bias,)
        more = {} if self.batch_invariant or name != "ffn_4" else {"batch_invariant": False}
        if not forward_is_torchs() or is_cast(x) or is_recorded(x, (weight, *extras)):
            return None
        if x.is_cuda and not is_watched():
            try:
                eager: Tensor = operator(tokens, weight, *threshold, bias=self.bias, **more)
                return eager.view(*shape[:-1], -1)
            except (TypeError, ValueError):  # what the operators refuse, torch does, or refuses as it always did
                return None
        if not is_taken(tokens, weight, extras=extras, axis=0 if name == "ffn_4" else -1):
            return None
        return dispatched(name, tokens, (weight,), *threshold, bias=self.bias, **more).view(*shape[:-1], -1)


class SparseUp(_Half):
    """The up-projection and, for few tokens, the (FAT)ReLU that the layer applies to it next, which then changes nothing."""

    _operator = "ffn_12"

    def __init__(self, linear: nn.Linear, layer: nn.Module, family: MLPFamily, threshold: float, activation: nn.Module) -> None:
        super().__init__(linear)
        self._layer: tuple[nn.Module, ...] = (layer,)  # no submodule
        # The layer's own activation, and the one that is there now, which differs where a threshold was moved.
        self._activation: tuple[nn.Module, ...] = (activation, getattr(layer, family.activation))
        self._names = family.up, family.activation
        self.threshold = threshold

    def forward(self, input: Tensor) -> Tensor:
        """``input @ weight.T + bias``, of few tokens after its activation."""
        x = input
        if self._is_followed() and (y := self._by_operator(ffn_12, x, self.weight, self.threshold)) is not None:
            return y
        return nn.functional.linear(x, self.weight, self.bias)

    def put_back_activation(self) -> None:
        """Give the layer the activation that it had, unless it has got another since."""
        own, moved = self._activation
        if getattr(self._layer[0], self._names[1], None) is moved:
            setattr(self._layer[0], self._names[1], own)

    def _is_followed(self) -> bool:
        """Whether the layer still applies this activation to what this module returns, and nothing else."""
        up, activation = self._names
        modules = self._layer[0]._modules
        after: Any = modules.get(activation)
        if modules.get(up) is not self or after is None or does_more(after) or self._forward_hooks:
            return False
        return (type(after) is nn.ReLU and self.threshold == 0) or (
            type(after) is FATReLU and after.threshold == self.threshold
        )


class SparseDown(_Half):
    """The down-projection: for few tokens it reads no weight of an input that is zero, whatever made it zero.

    Its weight is the transposed view of a contiguous (d_ff, d_model) buffer.
    """

    _operator = "ffn_4"

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        pack(self)
        self.register_load_state_dict_post_hook(_pack_what_was_loaded)  # type: ignore[no-untyped-call]

    def forward(self, input: Tensor) -> Tensor:
        """``input @ weight.T + bias``"""
        x = input
        y = self._by_operator(ffn_4, x, self.weight.mT)
        return nn.functional.linear(x, self.weight, self.bias) if y is None else y


def _pack_what_was_loaded(module: SparseDown, incompatible_keys: Any) -> None:
    pack(module)
