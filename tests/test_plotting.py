"""Pictures of latent weights and of epochs: numbers and refusals. That of a training run is tested with the Trainer."""

import pytest
import torch
from torch import nn

from rebnn_hf import plot_epoch_flips, plot_latent_weights
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


def test_flips_are_drawn_over_epochs(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **style: drawn.append((x, y, style["linewidth"])))
    ratios = ((0.5, 0.2, 0.3), (0.1, 0.0, 0.02))
    epochs = [
        {"epoch": 1.0 + i, "step": 7 + 7 * i, "epoch_flip_ratio": total}
        | {"epoch_flip_ratio/a": first, "epoch_flip_ratio/b": last}
        for i, (first, last, total) in enumerate(ratios)
    ]
    plot_epoch_flips([{"loss": 1.0, "flip_ratio": 0.4, "step": 1}, *epochs], tmp_path / "epochs.png")
    assert drawn == [([1.0, 2.0], [0.5, 0.1], 0.6), ([1.0, 2.0], [0.2, 0.0], 0.6), ([1.0, 2.0], [0.3, 0.02], 2)]
    assert (tmp_path / "epochs.png").read_bytes().startswith(b"\x89PNG")


def test_runs_shorter_than_an_epoch_have_no_picture_of_epochs(tmp_path):
    with pytest.raises(ValueError, match=r"no 'epoch_flip_ratio'; pass .* that trained for a whole epoch"):
        plot_epoch_flips([{"loss": 1.0, "flip_ratio": 0.4, "step": 1}], tmp_path / "epochs.png")
    assert not list(tmp_path.iterdir())
