"""The picture of latent weights: its numbers and refusals. That of a training run is tested with the Trainer."""

import pytest
import torch
from torch import nn

from rebnn_hf import plot_latent_weights
from rebnn_hf.functional import WeightRule
from rebnn_hf.layers import BinaryConv2d, BinaryLinear
from rebnn_hf.plotting import WIDEST, latent_histogram


def test_histogram_is_in_units_of_the_scale_of_each_row():
    layer = BinaryLinear(4, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -1.0, 0.1, 9.0], [0.05, -0.05, 0.01, -9.0]]))
        layer.weight_scale.copy_(torch.tensor([2.0, 0.1]))
    edges, shares = latent_histogram(layer, bins=12)  # half a scale each
    assert torch.equal(edges, torch.linspace(-WIDEST, WIDEST, 13)) and shares.sum() == pytest.approx(1)
    found = {edges[i].item(): shares[i].item() for i in range(12) if shares[i]}
    # 0.5, -0.5, 0.05, beyond; 0.5, -0.5, 0.1, beyond to the left
    assert found == pytest.approx({0.5: 2 / 8, -0.5: 2 / 8, 0.0: 2 / 8, 2.5: 1 / 8, -3.0: 1 / 8})


def test_centered_weights_and_convolutions():
    conv = BinaryConv2d(2, 3, 3, rule=WeightRule(scale="mean_abs", center="row"))
    _, shares = latent_histogram(conv, bins=2)
    rows = conv.weight.detach().flatten(1)
    below = ((rows - rows.mean(1, keepdim=True)) < 0).float().mean().item()
    assert shares[0].item() == pytest.approx(below)


@pytest.mark.parametrize("depth, drawn", [(1, ["0"]), (4, ["0", "2"]), (9, ["0", "4"])])
def test_layers_from_first_to_last(depth, drawn, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda self, title, **kwargs: titles.append(title))
    model = nn.Sequential(*(BinaryLinear(5, 5) for _ in range(depth)))
    plot_latent_weights(model, tmp_path / "weights.png", layers=3)
    assert titles[0] == drawn[0] and titles[-1] == str(depth - 1) and len(titles) == min(3, depth)
    assert titles[:2] == drawn or depth == 1
    assert (tmp_path / "weights.png").read_bytes().startswith(b"\x89PNG")


def test_models_without_latent_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no latent layer"):
        plot_latent_weights(nn.Linear(2, 2), tmp_path / "weights.png")
    with pytest.raises(ValueError, match="before pack"):
        plot_latent_weights(nn.Sequential(BinaryLinear(5, 5).pack()), tmp_path / "weights.png")
    assert not list(tmp_path.iterdir())
