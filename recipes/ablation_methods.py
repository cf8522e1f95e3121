"""The methods a grid compares: presets, weight rules, and weight rules on top of presets, each under one name."""

from __future__ import annotations

from dataclasses import dataclass

from rebnn_hf.presets import CONFIGS, loss_fields

# A rule decides everything it is about, so that no preset shows through: where the scales come from, and the balance.
RULES: dict[str, dict[str, str]] = {
    "bwn": {"weight_scale": "mean_abs", "balance_rule": "none"},
    "learned-scale": {"weight_scale": "learned", "balance_rule": "none"},
    "const-2e-4": {"weight_scale": "learned", "balance_rule": "const", "balance_value": "2e-4"},
    "max-gradient": {"weight_scale": "learned", "balance_rule": "maxgrad"},
    "rebnn": {"weight_scale": "learned", "balance_rule": "flip_maxgrad"},
    "decoupled": {"weight_scale": "learned", "balance_rule": "flip_maxgrad", "balance_form": "decoupled"},
}
"""Options of `glue.py` behind each rule."""


@dataclass(frozen=True)
class Method:
    """One way to make a model 1-bit.

    Attributes:
        preset: A named method of rebnn_hf; None: its defaults.
        rule: A name of `RULES`; None: what the preset says.
    """

    preset: str | None = None
    rule: str | None = None

    def argv(self) -> list[str]:
        """The options that ask `glue.py` for it."""
        preset = ["--preset", self.preset] if self.preset else []
        return preset + [word for name, value in self.options().items() for word in (f"--{name}", value)]

    def options(self) -> dict[str, str]:
        """What its rule fixes."""
        return RULES[self.rule] if self.rule else {}

    def same_losses(self, other: Method) -> bool:
        """Whether both are distilled by the same losses: only then their values can be compared."""
        mine, others = (loss_fields(method.preset) if method.preset else {} for method in (self, other))
        return mine == others


METHODS: dict[str, Method] = {
    **{rule: Method(rule=rule) for rule in RULES},
    **{preset: Method(preset) for preset in CONFIGS},
    **{f"{preset}+{rule}": Method(preset, rule) for preset in CONFIGS for rule in RULES},
}
"""Everything `--methods` takes."""


def method_name(name: str) -> str:
    """`name`, for argparse.

    Raises:
        ValueError: If there is no such method.
    """
    if name not in METHODS:
        raise ValueError(
            f"unknown method {name!r}: expected a preset ({', '.join(CONFIGS)}), a weight rule ({', '.join(RULES)}), "
            "or PRESET+RULE"
        )
    return name
