"""ReBNNConfig: the one object saved with a model (as `quantization_config` in config.json)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from .activations import BITS, ActivationRule
from .functional import BalanceRule, Ties, WeightRule, check_fields, shown
from .presets import config_fields

FORMAT_VERSION = 2
"""Version of config and bit format that this package writes; it reads this one and all before it."""


RECORDS = ("converted", "converted_head", "converted_attention", "converted_ffn", "not_converted")
"""Fields in which `binarize` records what it did."""


@register_quantization_config("rebnn")
@dataclass
class ReBNNConfig(QuantizationConfigMixin):
    """What is 1-bit in a model, and by which method.

    Loss weights and learning rates are not here: they belong to `ReBNNTrainingArguments`.

    Args:
        weight_scale, scale_granularity, scale_gradient, weight_center, center_gradient, weight_ste, ste_slope:
            the weight rule, see `functional.WeightRule`. Default: ReBNN. Closed-form
            BWN: `weight_scale="mean_abs"` with `balance_rule="none"`.
        balance_rule, balance_value, balance_lower, balance_upper, balance_form, balance_strength: the balance rule,
            see `functional.BalanceRule`. Default: the paper's.
        activation: how the inputs of 1-bit linear layers become few bits, see `activations.ActivationRule`. Default:
            they stay float.
        activation_bits: 1, or for `elastic` also 2, 4, 8; default 1 (8 for `token`, 32 without activation).
        signed_init, unsigned_init: start of the scales of `elastic`.
        attention: `softmax` in float; `bool`, BiBERT's Bi-Attention; `elastic`, BiT's, with `activation_bits`. Both
            with queries, keys and values in as few bits, on architectures that `architecture.LAYOUTS` knows.
        ffn_activation: function between the linear layers of the feed-forward block: that of the `model`, `relu`, or
            `rprelu` (ReActNet); the latter two on the same architectures.
        ties: what becomes of values exactly on a threshold: `up`, or `released` as in the released codes (sign(0) = 0,
            bool(0) = 0, half-way to even), which can be trained but not packed.
        word_embeddings: binarize the word embeddings (one scale per token).
        pooler: binarize the pooler.
        head: binarize the linear layers of the task head; of timm's models what they call their classifier, of a plain
            module those outside its blocks.
        untie_embeddings: allow binarizing word embeddings that a masked-LM decoder shares: the decoder then gets a
            float copy of its own. Without it such a model is refused.
        modules_to_not_convert: modules to leave float, with all they contain: names, whole parts of names
            (`attention`, `layer.0`), or regular expressions for the start of a name.
        state: `latent` (trainable) or `packed` (bits); set by `binarize` and `pack`.
        converted: names of the 1-bit modules, relative to the base model (of plain modules: their names); set by
            `binarize`.
        converted_head: names of the 1-bit modules outside the base model; set by `binarize`.
        converted_attention, converted_ffn: names of the attention modules and of the feed-forward functions that were
            changed, relative to the base model; set by `binarize`.
        not_converted: linear and embedding modules left float; set by `binarize`.
        format_version: of config and bits.

    Raises:
        ValueError: an unknown field or choice, a combination that cannot work, or a file written by a newer version of
            this package.
    """

    weight_scale: Literal["learned", "mean_abs"] = "learned"
    scale_granularity: Literal["row", "tensor"] = "row"
    scale_gradient: Literal["none", "exact", "xnor"] = "none"
    weight_center: Literal["none", "row", "tensor"] = "none"
    center_gradient: bool = True
    weight_ste: Literal["clip", "identity"] = "clip"
    ste_slope: Literal["scale", "unit"] = "scale"
    balance_rule: Literal["flip_maxgrad", "maxgrad", "const", "none"] = "flip_maxgrad"
    balance_value: float = 2e-4
    balance_lower: float | None = None
    balance_upper: float | None = None
    balance_form: Literal["gradient", "decoupled"] = "gradient"
    balance_strength: float = 1.0
    activation: Literal["none", "sign", "rsign", "elastic", "token"] = "none"
    activation_bits: int | None = None
    signed_init: float = 2.0
    unsigned_init: float = 4.0
    attention: Literal["softmax", "bool", "elastic"] = "softmax"
    ffn_activation: Literal["model", "relu", "rprelu"] = "model"
    ties: Ties = "up"
    word_embeddings: bool = False
    pooler: bool = False
    head: bool = False
    untie_embeddings: bool = False
    modules_to_not_convert: list[str] | None = None
    state: Literal["latent", "packed"] = "latent"
    converted: list[str] = field(default_factory=list)
    converted_head: list[str] = field(default_factory=list)
    converted_attention: list[str] = field(default_factory=list)
    converted_ffn: list[str] = field(default_factory=list)
    not_converted: list[str] = field(default_factory=list)
    weight_bits: int = 1
    format_version: int = FORMAT_VERSION
    quant_method: str = "rebnn"

    def __post_init__(self):
        if type(self.format_version) is not int or not 1 <= self.format_version <= FORMAT_VERSION:
            raise ValueError(
                f"format_version={shown(self.format_version)} cannot be read: this rebnn_hf knows versions 1 to "
                f"{FORMAT_VERSION}. Upgrade with `pip install -U rebnn_hf`."
            )
        if self.quant_method != "rebnn" or self.weight_bits != 1:
            raise ValueError(
                f"quant_method={shown(self.quant_method)} with weight_bits={shown(self.weight_bits)} is not a rebnn "
                "config (quant_method='rebnn', weight_bits=1)."
            )
        check_fields(self)
        for name in ("modules_to_not_convert", *RECORDS):
            self._check_names(name)
        self.modules_to_not_convert = self.modules_to_not_convert or None
        if self.activation_bits is None:
            self.activation_bits = BITS[self.activation][0]
        self.rule()
        self.balance()
        self.activation_rule()
        self._check_combination()

    def _check_names(self, field_name: str) -> None:
        names = getattr(self, field_name)
        if names is None and field_name == "modules_to_not_convert":
            return
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError(f"{field_name} must be a list of module names, got {shown(names)}.")
        if field_name in RECORDS and len(set(names)) < len(names):
            raise ValueError(f"{field_name} names a module twice: {shown(sorted(names))}.")

    def _check_combination(self) -> None:
        """Refuse what cannot work together."""
        if self.attention == "elastic" and self.activation_bits not in BITS["elastic"]:
            raise ValueError(
                f"attention='elastic' has the bits of the activations, and activation={self.activation!r} has "
                f"{self.activation_bits}; use activation='elastic', or attention='softmax'."
            )
        if self.attention == "bool" and self.activation_bits != 1:
            raise ValueError(
                f"attention='bool' goes with 1-bit activations, and activation={self.activation!r} has "
                f"{self.activation_bits} bits; use activation='sign', or attention='softmax'."
            )
        if self.ffn_activation == "relu" and self.activation in ("sign", "rsign"):
            raise ValueError(
                f"ffn_activation='relu' never gives negative values: activation={self.activation!r} would see one sign "
                "only; use activation='elastic', or ffn_activation='model' or 'rprelu'."
            )

    def rule(self) -> WeightRule:
        """The weight rule these fields describe."""
        return WeightRule(
            scale=self.weight_scale,
            granularity=self.scale_granularity,
            scale_gradient=self.scale_gradient,
            center=self.weight_center,
            center_gradient=self.center_gradient,
            ste=self.weight_ste,
            slope=self.ste_slope,
            ties=self.ties,
        )

    def balance(self) -> BalanceRule:
        """The balance rule these fields describe."""
        return BalanceRule(
            rule=self.balance_rule,
            value=self.balance_value,
            lower=self.balance_lower,
            upper=self.balance_upper,
            form=self.balance_form,
            strength=self.balance_strength,
        )

    def activation_rule(self) -> ActivationRule:
        """The activation rule these fields describe."""
        return ActivationRule(
            kind=self.activation,
            bits=self.activation_bits,
            signed_init=self.signed_init,
            unsigned_init=self.unsigned_init,
            ties=self.ties,
        )

    @classmethod
    def preset(cls, name: str, **overrides) -> ReBNNConfig:
        """A named method, see `presets.CONFIGS`.

        Args:
            name: for example `rebnn-bit-w1a1`.
            **overrides: fields to set otherwise.

        Raises:
            ValueError: no preset of that name, or a combination that cannot work.

        Example:
            >>> rebnn_hf.binarize(model, ReBNNConfig.preset("rebnn-bit-w1a1", word_embeddings=True))
        """
        return cls(**{**config_fields(name), **overrides})

    def method(self) -> dict[str, Any]:
        """The fields a user chooses, without those that record what was done to a model."""
        recorded = {"state", "format_version", *RECORDS}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in recorded}

    def get(self, key: str, default: Any = None) -> Any:
        """Value of a field; transformers reads a config object like the dict it was."""
        return getattr(self, key, default)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs):
        """Build from the dict in config.json.

        Raises:
            ValueError: the file was written by a newer version, or a field is unknown.
        """
        version = config_dict.get("format_version", FORMAT_VERSION)
        if type(version) is not int or version > FORMAT_VERSION:  # before its new fields look like mistakes
            cls(format_version=version)
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(config_dict) - known)
        if unknown:
            raise ValueError(
                f"unknown fields in the rebnn config: {_some(unknown)}; expected some of {', '.join(sorted(known))}."
            )
        chosen = {name: kwargs.pop(name) for name in list(kwargs) if name in known}
        config = cls(**{**config_dict, **chosen})
        config.format_version = FORMAT_VERSION  # of what is written: older files are read as what they would be today
        return (config, kwargs) if return_unused_kwargs else config


def config_of(model: nn.Module) -> ReBNNConfig | None:
    """The config that a model carries: in `model.config` as transformers wants it, a plain module by itself."""
    for holder in (getattr(model, "config", None), model):
        config = getattr(holder, "quantization_config", None)
        if isinstance(config, ReBNNConfig):
            return config
    return None


def give_config(model: nn.Module, config: ReBNNConfig) -> None:
    """Put a config where `config_of` finds it, and transformers saves it."""
    holder: Any = model.config if isinstance(model, PreTrainedModel) else model
    holder.quantization_config = config


def _some(names: list[str], most: int = 6, longest: int = 60) -> str:
    """Names for a message: those of a damaged file may be many and long."""
    listed = [name if len(name) <= longest else f"{name[:longest]}..." for name in names[:most]]
    return ", ".join(listed) + (f" and {len(names) - most} others" if len(names) > most else "")
