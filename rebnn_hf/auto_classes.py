"""By which classes a saved model is loaded, those of this package included."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import transformers
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

OWN_MODEL_TYPES = {"rebnn_faster_rcnn": "rebnn_hf.vision.detection"}
"""The `model_type` of architectures of this package, and the module that registers them with transformers."""


def saved_model_config(name: str) -> PreTrainedConfig:
    """The config of a model in a folder or on the Hub; an architecture of this package is registered first.

    Raises:
        ImportError: such an architecture, without the libraries that it needs.
        ValueError: there is none.
    """
    try:
        saved, _ = PreTrainedConfig.get_config_dict(name)
        if saved.get("model_type") in OWN_MODEL_TYPES:
            importlib.import_module(OWN_MODEL_TYPES[saved["model_type"]])
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError):
        raise ValueError(
            f"{name!r} is no model: neither a folder with a config.json that transformers knows, nor a name on the Hub "
            "that can be reached from here."
        ) from None


def class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that a model was saved as; AutoModel if that is not known."""
    name = (config.architectures or ["AutoModel"])[0]
    registered = (made for _, made in _made_by_auto_classes(type(config)) if made.__name__ == name)
    return getattr(transformers, name, None) or next(registered, AutoModel)


def auto_classes(model_class: type, config: PreTrainedConfig) -> list[str]:
    """Names of the Auto classes that load a `model_class` of this config: first `AutoModel`, if it is one of them, then
    those named after a task, last `AutoModelForPreTraining`."""
    found = dict.fromkeys(name for name, made in _made_by_auto_classes(type(config)) if issubclass(model_class, made))
    return sorted(found, key=lambda name: (name != "AutoModel", name == "AutoModelForPreTraining"))


def _made_by_auto_classes(config_class: type) -> Iterator[tuple[str, type]]:
    """Names of Auto classes, and what each makes of such a config."""
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if name.startswith("AutoModel") and mapping is not None and config_class in mapping:
            made = mapping[config_class]
            yield from ((name, kind) for kind in ([made] if isinstance(made, type) else made))
