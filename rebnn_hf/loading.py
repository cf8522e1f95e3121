"""Models by name, whatever state they are in: what the commands of `rebnn` read."""

from __future__ import annotations

from transformers import PreTrainedModel

from .auto_classes import class_of, saved_model_config

REMEDIES = {
    "packed": "`rebnn pack` makes one of a trained latent one",
    "latent": "`rebnn binarize` makes one of a float one",
    "float": "it is the one that `rebnn binarize` was given",
}
"""How to come by a model in a state."""


def load(name: str, *states: str) -> PreTrainedModel:
    """A model from a folder or the Hub, in eval mode, as the class that it was saved as.

    Args:
        name: folder, or name on the Hub.
        states: that will do: `float`, `latent`, `packed`.

    Raises:
        ValueError: there is none, or it is in another state.
    """
    config = saved_model_config(name)
    saved = getattr(config, "quantization_config", None) or {}
    ours = saved.get("quant_method") == "rebnn"
    state = saved.get("state") if ours else "quantized" if saved else "float"
    if state not in states:
        found = (
            f"quant_method={saved.get('quant_method')!r}, state={saved.get('state')!r}"
            if saved
            else "no quantization_config"
        )
        raise ValueError(
            f"{name!r} is not a {' or '.join(states)} model: its config has {found}; {REMEDIES[states[0]]}."
        )
    return class_of(config).from_pretrained(name).eval()


def check_twins(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Refuse models that do not read the same tokens or do not have the same shape.

    Raises:
        ValueError: they differ.
    """
    for key in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers"):
        mine, theirs = (getattr(m.config, key, None) for m in (model, other))
        if mine != theirs:
            raise ValueError(
                f"the float model has {key}={theirs!r} and the packed one {mine!r}: it was made from another."
            )
