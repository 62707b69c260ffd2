"""The sparsity meter."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason='the extra "torch" brings it')
transformers = pytest.importorskip("transformers", reason='the extra "hf" brings it')
from test_torch_patch import _ids, _model  # noqa: E402
from torch import nn  # noqa: E402
from torch_devices import DEVICES  # noqa: E402

from prosparse_cupy.torch import LayerSparsity, SparsityMeter, SparsityReport, measure_sparsity, patch_model  # noqa: E402


def _active_share(model, ids) -> list[float]:
    """By hand, from what each down_proj is given."""
    shares, hooks = [], []
    for layer in model.model.layers:
        hooks.append(
            layer.mlp.down_proj.register_forward_pre_hook(lambda _, a: shares.append((a[0] != 0).double().mean().item()))
        )
    with torch.inference_mode():
        model(ids)
    for hook in hooks:
        hook.remove()
    return shares


@pytest.mark.parametrize("device", DEVICES)
def test_counts_what_down_proj_is_given(device):
    model = _model(device=device)
    ids = _ids(device)
    report = measure_sparsity(model, ids)
    assert [x.active for x in report.layers] == pytest.approx(_active_share(model, ids))
    assert [x.tokens for x in report.layers] == [7] * 3
    assert 0.3 < report.sparsity < 0.7 and report.weights_read == pytest.approx(1 - report.sparsity * 2 / 3)
    assert not hasattr(model.model.layers[0].mlp, "counts") and not model.model.layers[0].mlp.down_proj._forward_pre_hooks
    assert measure_sparsity(_model(device=device, hidden_act="silu"), ids).sparsity < 1e-3


@pytest.mark.parametrize("device", DEVICES)
def test_patched_and_unpatched_count_the_same_and_decode_the_same(device):
    model = _model(device=device)

    def text_and_report():
        with SparsityMeter(model) as meter, torch.inference_mode():
            return model.generate(_ids(device), max_new_tokens=12, do_sample=False), meter.report()

    text, dense = text_and_report()
    patch_model(model)
    with torch.inference_mode():
        assert torch.equal(model.generate(_ids(device), max_new_tokens=12, do_sample=False), text)
    again, sparse = text_and_report()
    assert torch.equal(again, text) and [x.tokens for x in sparse.layers] == [7 + 11] * 3
    assert [x.active for x in sparse.layers] == pytest.approx([x.active for x in dense.layers], abs=1e-3)
    assert model.model.layers[0].mlp.counts is None


def test_reset_remove_and_a_second_meter():
    model = _model()
    meter = SparsityMeter(model)
    with pytest.raises(ValueError, match="another meter counts this model"):
        SparsityMeter(model)
    with torch.inference_mode():
        model(_ids())
        meter.reset()
        model(_ids())
        meter.remove()
        meter.remove()
        model(_ids())
    assert [x.tokens for x in meter.report().layers] == [7] * 3
    with pytest.raises(ValueError, match="Linear has no MLP of a family that is known"):
        SparsityMeter(nn.Linear(2, 2))


def test_a_meter_of_some_layers():
    model = _model()
    with pytest.raises(ValueError, match=r"no MLP is named layers\.9; LlamaForCausalLM has model\.layers\.0\.mlp, "):
        SparsityMeter(model, ["model.layers.2.mlp", "layers.9"])
    numbered = nn.Sequential(model.model.layers[0].mlp)
    with pytest.raises(ValueError, match="no MLP is named 0; Sequential has 0"):
        SparsityMeter(numbered, [0])  # which is no name, though it looks like one
    with pytest.raises(ValueError, match="no MLP of a family that is known among no names"):
        SparsityMeter(model, [])
    for wrong in ("model.layers.2.mlp", 3, iter(["model.layers.2.mlp"])):
        with pytest.raises(TypeError, match="layers must be a collection of names, got"):
            SparsityMeter(model, wrong)
    assert not any(hasattr(module, "counts") or module._forward_pre_hooks for module in model.modules())
    with (
        SparsityMeter(model, ["model.layers.2.mlp"]) as meter,
        SparsityMeter(model, {"model.layers.0.mlp"}),
        torch.inference_mode(),
    ):
        model(_ids())
    assert [(x.name, x.tokens) for x in meter.report().layers] == [("model.layers.2.mlp", 7)]
    assert not hasattr(model.model.layers[2].mlp, "counts")


def test_a_meter_that_cannot_count_a_layer_leaves_none_behind():
    model = _model()
    model.model.layers[1].mlp.down_proj = nn.Identity()
    with pytest.raises(AttributeError):
        SparsityMeter(model)
    assert not any(hasattr(module, "counts") or module._forward_pre_hooks for module in model.modules())


@pytest.mark.gpu
def test_counts_in_a_cuda_graph(torch_gpu):
    model = _model(device="cuda")
    patch_model(model)
    mlp, x = model.model.layers[0].mlp, torch.randn(1, 1, 64, device="cuda")
    with torch.inference_mode(), SparsityMeter(model) as meter:
        mlp(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            mlp(x)
        meter.reset()
        for _ in range(5):
            graph.replay()
    assert meter.report().layers[0].tokens == 5 and 0 < meter.report().layers[0].active < 1


def test_report_reads_and_draws(tmp_path):
    report = SparsityReport((LayerSparsity("layers.0.mlp", 0.25, 3), LayerSparsity("layers.1.mlp", 0.05, 3)))
    assert report.sparsity == pytest.approx(0.85)
    text = str(report)
    assert text.startswith("average sparsity 85.00%: decoding reads 43% of the FFN's weights")
    assert "layers.0.mlp" in text and "25.00%" in text and "95.00%" in text
    pytest.importorskip("matplotlib", reason='the extra "bench" brings it')
    report.save_figure(tmp_path / "shares.svg")
    drawn = (tmp_path / "shares.svg").read_text()
    assert drawn.startswith("<?xml") and "</svg>" in drawn
