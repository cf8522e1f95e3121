"""By which Auto classes of transformers a model is loaded."""

from __future__ import annotations

from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto


def auto_classes(model_class: type, config: PreTrainedConfig) -> list[str]:
    """Names of the Auto classes that load a `model_class` of this config: first `AutoModel`, if it is one of them, then
    those named after a task, last `AutoModelForPreTraining`."""
    found = []
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if name.startswith("AutoModel") and mapping is not None and type(config) in mapping:
            made = mapping[type(config)]
            if issubclass(model_class, made if isinstance(made, type) else tuple(made)):
                found.append(name)
    return sorted(found, key=lambda name: (name != "AutoModel", name == "AutoModelForPreTraining"))
