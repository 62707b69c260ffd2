"""The state of a model, which says whether its decoding step still serves it."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch import nn  # noqa: E402

from prosparse_cupy.torch import SparseGatedMLP, patch_model  # noqa: E402
from prosparse_cupy.torch.eligibility import state_of  # noqa: E402


class _Thing:
    """Something that is equal to itself alone."""


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.act = nn.Linear(8, 16), nn.Linear(16, 8, bias=False), nn.ReLU()
        self.scales, self.names, self.table, self.other = [1.0, [2, 3]], ("a", "b"), {"x": 1, "y": {"z": 2}}, _Thing()
        self.register_buffer("positions", torch.arange(4))

    def forward(self, x):
        return self.second(self.act(self.first(x)))


class _Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _pop(model: nn.Module) -> None:
    del model.table["y"]["z"]


def _bias(model: nn.Module) -> None:
    model.second.bias = nn.Parameter(torch.zeros(8))


CHANGES = {
    "other memory": lambda m: setattr(m.first.weight, "data", m.first.weight.data.clone()),
    "another view": lambda m: setattr(m.second.weight, "data", m.second.weight.data.t().contiguous().t()),
    "another dtype": lambda m: m.half(),
    "another buffer": lambda m: setattr(m, "positions", m.positions.clone()),
    "a bias more": _bias,
    "another number": lambda m: setattr(m.first, "in_features", 9),
    "a number in a list": lambda m: m.scales[1].append(4),
    "what a dict in a dict has": _pop,
    "a name": lambda m: setattr(m, "names", ("a", "c")),
    "an object": lambda m: setattr(m, "other", _Thing()),
    "training": lambda m: m.act.train(),
    "a hook": lambda m: m.act.register_forward_hook(lambda *_: None),
    "a forward of its own": lambda m: setattr(m.first, "forward", lambda x: x),
    "another class": lambda m: setattr(m.first, "__class__", _Doubled),
    "a module in another's place": lambda m: setattr(m, "act", nn.SiLU().eval()),
    "a module more": lambda m: m.add_module("third", nn.Identity().eval()),
}


@pytest.mark.quick
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_another_state(change):
    model = _Layer().eval()
    before = state_of(model)
    assert state_of(model) == before
    model(torch.ones(8))
    assert state_of(model) == before, "a call changes nothing"
    change(model)
    assert state_of(model) != before


@pytest.mark.quick
def test_what_is_undone_is_the_state_of_before():
    model = _Layer().eval()
    before = state_of(model)
    hook = model.act.register_forward_hook(lambda *_: None)
    model.train()
    kept, model.other = model.other, _Thing()
    assert state_of(model) != before
    hook.remove()
    model.eval()
    model.other = kept
    assert state_of(model) == before


@pytest.mark.quick
def test_an_object_that_is_gone_is_no_other():
    """A new one may be at its address."""
    model = _Layer().eval()
    before = state_of(model)
    del model.other
    model.other = _Thing()
    assert state_of(model) != before


def test_a_patched_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    dims = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 32}
    model = LlamaForCausalLM(LlamaConfig(**dims, hidden_act="relu")).eval()
    dense = state_of(model)
    patch_model(model)
    patched = state_of(model)
    assert patched != dense and state_of(model) == patched
    with torch.no_grad():
        model(torch.ones(1, 3, dtype=torch.int64))
    assert state_of(model) == patched, "what modules keep of calls is no state"
    mlp = next(m for m in model.modules() if isinstance(m, SparseGatedMLP))
    mlp.act_fn.threshold = 0.25
    assert state_of(model) != patched
