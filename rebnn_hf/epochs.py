"""How many signs an epoch changed, in each layer: what the paper's figures of oscillation have on their axis.

The flip ratio of an epoch is the share of weights whose sign at its end is another than at the end of the epoch before
(for the first epoch: at the start). A weight that flips and flips back within an epoch does not count; what happens in
single steps is in `resilience`. The paper does not print how it aggregates over an epoch; this is our reading of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .checkpoints import SIGNS_FILE
from .packing import pack_signs, unpack_signs


class EpochFlips:
    """Compares the signs of latent layers at the ends of epochs.

    Args:
        layers: names and latent layers, with the weights that the first epoch starts from.
    """

    def __init__(self, layers: Mapping[str, nn.Module]):
        self._layers = dict(layers)
        self._signs: dict[str, Tensor] = {}
        self.end_epoch()

    @torch.no_grad()
    def end_epoch(self) -> dict[str, dict[str, float]]:
        """Close an epoch.

        Returns:
            For each layer name: `weights`, their number, and `epoch_flip_ratio`. Empty where the epoch's start is not
            known, after `load` from a checkpoint without it.
        """
        report = {}
        for name, layer in self._layers.items():
            signs = layer.signs()
            if name in self._signs:
                before = unpack_signs(self._signs[name], signs.shape[1], torch.int8) > 0
                flips = (signs != before).sum().item()
                report[name] = {"weights": signs.numel(), "epoch_flip_ratio": flips / signs.numel()}
            self._signs[name] = pack_signs(signs)
        return report

    def save(self, checkpoint: str | Path) -> None:
        """Write the signs of the last epoch's end into the folder of a checkpoint."""
        save_file(self._signs, Path(checkpoint) / SIGNS_FILE)

    def load(self, checkpoint: str | Path) -> None:
        """Go on from a checkpoint; where it has no signs, the epoch that it lies in gets no ratio."""
        file = Path(checkpoint) / SIGNS_FILE
        saved = load_file(file) if file.is_file() else {}
        self._signs = {
            name: saved[name].to(layer.weight.device) for name, layer in self._layers.items() if name in saved
        }
