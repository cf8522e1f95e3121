"""Pictures of a training run, from the Trainer's own log history. Needs matplotlib (extra `plot`)."""

from __future__ import annotations

from pathlib import Path

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
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plot_oscillation needs matplotlib: pip install 'rebnn_hf[plot]'") from error
    from matplotlib.figure import Figure

    logs = [log for log in log_history if "flip_ratio" in log]
    if not logs:
        raise ValueError("log_history holds no 'flip_ratio'; pass trainer.state.log_history of a ReBNNTrainer.")
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, 3).flat
    for axis, (name, title, logarithmic) in zip(axes, _PANELS, strict=False):
        layers = [key for key in logs[0] if key.startswith(f"{name}/")]
        for index, layer in enumerate(layers):
            shade = matplotlib.colormaps["viridis"](index / max(1, len(layers) - 1))
            axis.plot(*_series(logs, layer), color=shade, linewidth=0.6, alpha=0.7)
        axis.plot(*_series(logs, name), color="black", linewidth=2)
        axis.set(title=title, xlabel="step")
        if logarithmic:
            positive = [log[name] for log in logs if log.get(name, 0) > 0]
            axis.set_yscale("symlog", linthresh=min(positive, default=1e-9))
            axis.set_ylim(bottom=0)
    last = axes[-1]
    for name in [key for key in logs[0] if key == "loss" or key.startswith("loss_")]:
        last.plot(*_series(logs, name), label=name.removeprefix("loss_"))
    last.set(title="losses", xlabel="step", yscale="log")
    last.legend()
    figure.savefig(path, dpi=110)


def _series(logs: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    points = [(log["step"], log[name]) for log in logs if name in log]
    return [step for step, _ in points], [value for _, value in points]
