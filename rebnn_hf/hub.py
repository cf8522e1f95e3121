"""What a saved folder needs to be loaded by people who do not know this package: for `docs/hub.md`."""

from __future__ import annotations

import json
from pathlib import Path

import transformers
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from .auto_classes import OWN_MODEL_TYPES, auto_classes

MODULE = "modeling_rebnn"
"""The Python file in the folder, without its suffix."""

NOTICE = (
    "none, for this is a 1-bit checkpoint of the package rebnn_hf: `pip install rebnn_hf`, and `import rebnn_hf` "
    "before loading it, or load it with trust_remote_code=True"
)
"""What transformers repeats in its error if it reads the folder without this package."""

STUB = '''"""For `from_pretrained(..., trust_remote_code=True)`: the import lets transformers read 1-bit checkpoints."""

import rebnn_hf  # noqa: F401
import transformers
'''


def allow_loading_without_import(folder: str | Path) -> None:
    """Let a saved folder, packed or latent, be loaded in programs that do not `import rebnn_hf`.

    Adds a few lines of Python, `modeling_rebnn.py`, which import the package, and names them in `config.json`
    (`auto_map`). Whoever passes `trust_remote_code=True` to `from_pretrained` or `pipeline` then gets the model, or,
    where the package is not installed, an ImportError that names it. Whoever neither imports it nor passes that gets a
    ValueError that names it: `transformers_weights` in `config.json`, meant for the name of a file, holds that
    sentence, and is ignored where the package is imported. Call it after `save_pretrained`, for saving a loaded model
    leaves all of this out; calling it twice does no harm.

    Args:
        folder: written by `save_pretrained`.

    Raises:
        ValueError: not the folder of a 1-bit model; one that brings code of its own; a timm architecture or a detector
            of this package, whose config is not readable without the import; a class that no Auto class loads. The
            folder is as it was.

    Example:
        >>> rebnn_hf.pack(model).save_pretrained("packed")
        >>> rebnn_hf.allow_loading_without_import("packed")
        >>> AutoModel.from_pretrained("packed", trust_remote_code=True)  # in a program without `import rebnn_hf`
    """
    folder = Path(folder)
    saved = _saved_config(folder)
    names = _loaders(folder, saved)
    classes = sorted(set(names.values()))
    saved |= {"auto_map": {auto: f"{MODULE}.{name}" for auto, name in names.items()}, "transformers_weights": NOTICE}
    code = "".join(f"\n\nclass {name}(transformers.{name}):\n    pass\n" for name in classes)
    (folder / f"{MODULE}.py").write_text(STUB + code, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")


def forget_folder(config: PreTrainedConfig) -> None:
    """Take out of a config that is being loaded what `allow_loading_without_import` put into its folder."""
    weights = getattr(config, "transformers_weights", None) or ""
    if "rebnn_hf" in weights and not weights.endswith((".safetensors", ".json")):  # a notice, of whatever version
        del config.transformers_weights
    if _is_ours(getattr(config, "auto_map", None)):
        del config.auto_map


def _saved_config(folder: Path) -> dict:
    """What `config.json` says, if it is that of a 1-bit model for which code can be added."""
    file = folder / "config.json"
    saved = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if (saved.get("quantization_config") or {}).get("quant_method") != "rebnn":
        raise ValueError(
            f"{folder} is not the folder of a 1-bit model; save one with model.save_pretrained({str(folder)!r}) first."
        )
    needed = ({"timm_wrapper": "rebnn_hf"} | OWN_MODEL_TYPES).get(saved["model_type"])
    if needed is not None:
        raise ValueError(
            f"{folder} holds a model of type {saved['model_type']}, whose config is read before any code beside it; "
            f"its users have to `import {needed}`."
        )
    if saved.get("auto_map") and not _is_ours(saved["auto_map"]):
        raise ValueError(f"{folder} brings code of its own ({saved['auto_map']}); import rebnn_hf in that.")
    return saved


def _loaders(folder: Path, saved: dict) -> dict[str, str]:
    """Auto class -> class: those that make the saved class, and AutoModel, which makes its encoder."""
    config = AutoConfig.from_pretrained(folder)
    (name,) = saved.get("architectures") or ("None",)
    loaders = dict.fromkeys(auto_classes(getattr(transformers, name, object), config), name)
    if not loaders:
        raise ValueError(f"no Auto class of transformers loads {name}; import rebnn_hf in the code that defines it.")
    if type(config) in AutoModel._model_mapping:
        loaders.setdefault("AutoModel", AutoModel._model_mapping[type(config)].__name__)
    return loaders


def _is_ours(auto_map: dict | None) -> bool:
    """Whether all entries name our file, in this folder or (`user/model--`) in a repository."""
    references = (auto_map or {}).values()
    return bool(auto_map) and all(str(name).rpartition("--")[2].startswith(f"{MODULE}.") for name in references)
