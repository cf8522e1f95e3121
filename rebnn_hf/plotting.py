"""Pictures of a training run, from the Trainer's log history, of the weights it left, and of what models score for what
they cost. Needs matplotlib (`plot`)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .layers import LATENT_TYPES

_PANELS = (
    ("flip_ratio", "weights that flip in a step", True),
    ("flip_back_ratio", "flip, and back in the next step", True),
    ("balance_mean", "balance γ, mean over rows", True),
    ("near_zero_share", "share of |w| < 0.1 α", False),
    ("scale_to_mean_abs", "α / mean |w|", False),
)


def plot_oscillation(log_history: list[dict[str, float]], path: str | Path) -> None:
    """Draw oscillation statistics and losses over training steps.

    The bold line is the whole model; thin lines, where layers were logged (`log_oscillation="layer"`), run from the
    first layer (dark) to the last (light).

    Args:
        log_history: `trainer.state.log_history` of a `ReBNNTrainer`.
        path: PNG file to write.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the history holds no oscillation statistics.
    """
    matplotlib = _matplotlib()
    logs = [log for log in log_history if "flip_ratio" in log]
    if not logs:
        raise ValueError("log_history holds no 'flip_ratio'; pass trainer.state.log_history of a ReBNNTrainer.")
    figure = matplotlib.figure.Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, 3).flat
    for axis, (name, title, logarithmic) in zip(axes, _PANELS, strict=False):
        _draw_layers(axis, logs, name)
        axis.set(title=title, xlabel="step")
        if logarithmic:
            _scale_logarithmically(axis, [log[name] for log in logs if name in log])
    last = axes[-1]
    for name in [key for key in logs[0] if key == "loss" or key.startswith("loss_")]:
        last.plot(*_series(logs, name), label=name.removeprefix("loss_"))
    last.set(title="losses", xlabel="step", yscale="log")
    last.legend()
    figure.savefig(path, dpi=110)


def plot_epoch_flips(log_history: list[dict[str, float]], path: str | Path) -> None:
    """Draw the flip ratio of each epoch, as the paper does: the share of weights whose sign at its end is another than
    at the end of the epoch before (see `epochs`).

    The bold line is the whole model; thin lines, where layers were logged (`log_oscillation="layer"`), run from the
    first layer (dark) to the last (light).

    Args:
        log_history: `trainer.state.log_history` of a `ReBNNTrainer`.
        path: PNG file to write.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the history holds no whole epoch.
    """
    matplotlib = _matplotlib()
    logs = [log for log in log_history if "epoch_flip_ratio" in log]
    if not logs:
        raise ValueError(
            "log_history holds no 'epoch_flip_ratio'; pass trainer.state.log_history of a ReBNNTrainer that trained "
            "for a whole epoch."
        )
    figure = matplotlib.figure.Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    _draw_layers(axis, logs, "epoch_flip_ratio", over="epoch")
    axis.set(title="weights whose sign changed from the end of one epoch to the next", xlabel="epoch")
    axis.xaxis.get_major_locator().set_params(integer=True)
    _scale_logarithmically(axis, [log["epoch_flip_ratio"] for log in logs])
    figure.savefig(path, dpi=110)


WIDEST = 3.0
"""Latent weights are drawn up to this many scales from 0; what lies beyond is in the last bar."""


def plot_latent_weights(model: nn.Module, path: str | Path, layers: int = 6) -> None:
    """Draw how latent weights lie around their binary values, `w / alpha`, in layers from the first to the last.

    Weights near 0 flip easily; the reconstruction loss pulls them to -1 and +1 (the paper shows these histograms).

    Args:
        model: latent, made by `binarize`.
        path: PNG file to write.
        layers: how many are drawn.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the model has no latent layer.
    """
    matplotlib = _matplotlib()
    latent = [(name, module) for name, module in model.named_modules() if isinstance(module, LATENT_TYPES)]
    if not latent:
        raise ValueError("the model has no latent layer: pass one made by rebnn_hf.binarize(), before pack().")
    count = min(layers, len(latent))
    drawn = [latent[round(i * (len(latent) - 1) / max(1, count - 1))] for i in range(count)]
    columns = min(3, count)
    figure = matplotlib.figure.Figure(figsize=(4.3 * columns, 3 * -(-count // columns)), layout="constrained")
    axes = list(figure.subplots(-(-count // columns), columns, squeeze=False).flat)
    for axis, (name, layer) in zip(axes, drawn, strict=False):
        edges, shares = latent_histogram(layer)
        axis.stairs(shares, edges, fill=True, color="tab:blue")
        for binary in (-1, 1):
            axis.axvline(binary, color="black", linewidth=0.8, linestyle=":")
        axis.set_title(name, fontsize=8)
        axis.set(xlabel="w / α", ylabel="share of the weights")
    for axis in axes[count:]:
        axis.set_axis_off()
    figure.savefig(path, dpi=110)


@torch.no_grad()
def latent_histogram(layer: nn.Module, bins: int = 60) -> tuple[Tensor, Tensor]:
    """Shares of a layer's latent weights by their distance from 0 in units of the scale of their row.

    Args:
        layer: latent.
        bins: from -`WIDEST` to `WIDEST`.

    Returns:
        Edges [bins + 1] and shares [bins], which add up to 1.
    """
    ratio = (layer.centered() / layer.scale().unsqueeze(-1)).float().cpu().clamp(-WIDEST, WIDEST)
    edges = torch.linspace(-WIDEST, WIDEST, bins + 1)
    return edges, torch.histogram(ratio, edges).hist / ratio.numel()


def plot_tradeoff(comparison, path: str | Path, score: str | None = None) -> None:
    """Draw what models score against how large they are and, if that was measured, how long they take.

    Args:
        comparison: result of `rebnn_hf.compare` with scores.
        path: PNG file to write.
        score: name of the score; it may be left out if there is only one.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: there is no such score, or several and none named.
    """
    matplotlib = _matplotlib()
    rows = comparison.rows
    names = list(rows[0].scores)
    if score is None and len(names) == 1:
        (score,) = names
    if score not in names:
        raise ValueError(f"score={score!r} is not one that was compared; expected one of {', '.join(names) or 'none'}.")
    costs = {"MB": [row.bytes / 1e6 for row in rows]}
    if rows[0].milliseconds is not None:
        costs[f"ms, {comparison.measured}"] = [row.milliseconds for row in rows]
    figure = matplotlib.figure.Figure(figsize=(5.5 * len(costs), 4.2), layout="constrained")
    for axis, (cost, values) in zip(figure.subplots(1, len(costs), squeeze=False).flat, costs.items(), strict=True):
        scores = [row.scores[score] for row in rows]
        axis.scatter(values, scores, color="tab:blue")
        for row, x, y in zip(rows, values, scores, strict=True):
            axis.annotate(row.name, (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8)
        axis.set(xscale="log", xlabel=cost, ylabel=score)
        axis.margins(x=0.25, y=0.15)
    figure.savefig(path, dpi=110)


def _matplotlib():
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'rebnn_hf[plot]'") from error
    return matplotlib


def _draw_layers(axis, logs: list[dict[str, float]], name: str, over: str = "step") -> None:
    """A quantity of the whole model as a bold line over thin ones of its layers."""
    matplotlib = _matplotlib()
    layers = [key for key in logs[0] if key.startswith(f"{name}/")]
    marker = "." if len(logs) == 1 else None  # a line of one point is not seen
    for index, layer in enumerate(layers):
        shade = matplotlib.colormaps["viridis"](index / max(1, len(layers) - 1))
        axis.plot(*_series(logs, layer, over), color=shade, linewidth=0.6, alpha=0.7, marker=marker)
    axis.plot(*_series(logs, name, over), color="black", linewidth=2, marker=marker)


def _scale_logarithmically(axis, values: list[float]) -> None:
    """With room for 0."""
    axis.set_yscale("symlog", linthresh=min((value for value in values if value > 0), default=1e-9))
    axis.set_ylim(bottom=0)


def _series(logs: list[dict[str, float]], name: str, over: str = "step") -> tuple[list[float], list[float]]:
    points = [(log[over], log[name]) for log in logs if name in log]
    return [place for place, _ in points], [value for _, value in points]
