"""What a saved folder does to programs without this package: it refuses, or lets them in; see `docs/hub.md`."""

from __future__ import annotations

import json
from pathlib import Path

import transformers
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from .auto_classes import OWN_MODEL_TYPES, auto_classes
from .functional import shown

MODULE = "modeling_rebnn"
"""The Python file in the folder, without its suffix."""

NOTICE = (
    "none, for this is a 1-bit checkpoint of the package rebnn_hf: `pip install rebnn_hf`, and `import rebnn_hf` "
    "before loading it"
)
"""What transformers without this package repeats in the error it stops with; see `guard`."""

NOTICE_OF_CODE = f"{NOTICE}, or load it with trust_remote_code=True"
"""The same for a folder that brings code along."""

STUB = '''"""For `from_pretrained(..., trust_remote_code=True)`: the import lets transformers read 1-bit checkpoints."""

import rebnn_hf  # noqa: F401
import transformers
'''


def allow_loading_without_import(folder: str | Path) -> None:
    """Let a saved folder, packed or latent, be loaded in programs that do not `import rebnn_hf`.

    Adds a few lines of Python, `modeling_rebnn.py`, which import the package, and names them in `config.json`
    (`auto_map`). Whoever passes `trust_remote_code=True` to `from_pretrained` or `pipeline` then gets the model, or,
    where the package is not installed, an ImportError that names it. Whoever neither imports it nor passes that gets
    the ValueError of all folders of this package (`guard`), which then names this way too. Call it after
    `save_pretrained`, for saving a loaded model leaves all of this out; calling it twice does no harm.

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
    saved["auto_map"] = {auto: f"{MODULE}.{name}" for auto, name in names.items()}
    saved["fusion_config"] = {**_without_notices(saved.get("fusion_config")), NOTICE_OF_CODE: True}
    code = "".join(f"\n\nclass {name}(transformers.{name}):\n    pass\n" for name in classes)
    (folder / f"{MODULE}.py").write_text(STUB + code, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")


def guard(config: PreTrainedConfig) -> None:
    """Let transformers refuse, in words that name this package, what is saved with a config and loaded without it.

    transformers only warns of a quantization that it does not know, and goes on. But it stops with a ValueError at a
    key of `fusion_config` (fusions of modules to make while loading) that it does not know, and repeats the key: here a
    sentence. Where this package is imported, its quantizer takes the sentence out in time (`forget_folder`).

    Raises:
        ValueError: `fusion_config` is there, but is none.
    """
    config.fusion_config = {**_without_notices(getattr(config, "fusion_config", None)), NOTICE: True}


def unguard(config: PreTrainedConfig) -> None:
    """Take out what `guard` put in, in whatever version of this package."""
    fusions = _without_notices(getattr(config, "fusion_config", None))
    if fusions:
        config.fusion_config = fusions
    elif hasattr(config, "fusion_config"):
        del config.fusion_config


def forget_folder(config: PreTrainedConfig) -> None:
    """Take out of a config that is being loaded what was meant for programs that do not know this package."""
    unguard(config)
    if _is_ours(getattr(config, "auto_map", None)):
        del config.auto_map


def _without_notices(fusions: dict | None) -> dict:
    """The fusions that are some."""
    if not isinstance(fusions, dict | None):
        raise ValueError(f"fusion_config must be a dict of fusions, got {shown(fusions)}; take it out of the config.")
    return {name: options for name, options in (fusions or {}).items() if "rebnn_hf" not in name}


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
