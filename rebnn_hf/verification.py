"""Whether two models give the same answers: what `rebnn verify` finds out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

OUTPUTS = ("logits", "start_logits", "end_logits")
"""What an answer is read from; a model without a head has its `last_hidden_state`, and gives no answer."""


@dataclass(frozen=True)
class Agreement:
    """Result of `agreement`.

    Attributes:
        batches: that both read.
        equal_answers: share of them in which every largest logit is in the same place; None for models that give
            numbers (one logit, or hidden states).
        largest_difference: of an output.
        largest_output: of the reference, by absolute value, to see the difference beside.
    """

    batches: int
    equal_answers: float | None
    largest_difference: float
    largest_output: float

    def to_dict(self) -> dict:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        answers = "no classes to compare" if self.equal_answers is None else f"{self.equal_answers:.2%} equal answers"
        size = f"largest difference {self.largest_difference:.3g} in outputs up to {self.largest_output:.3g}"
        return f"{self.batches} input(s): {answers}; {size}."


@torch.inference_mode()
def agreement(model: PreTrainedModel, reference: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> Agreement:
    """Let two models read the same and compare their outputs.

    Args:
        model: in eval mode.
        reference: of the same class, in eval mode.
        batches: inputs as for `model(**batch)`; best one text (one question with its choices, one image) each, whose
            answer is then right or wrong as a whole. Where answers are for each token, without padding, of which a
            fused encoder makes zeros.

    Raises:
        ValueError: no batch, or models of two classes.
    """
    if type(model) is not type(reference):
        raise ValueError(f"a {type(model).__name__} and a {type(reference).__name__} give different kinds of answers.")
    equal, differences, sizes = [], [], []
    for batch in batches:
        mine, theirs = _outputs(model(**batch)), _outputs(reference(**batch))
        differences += [(mine[name] - tensor).abs().max() for name, tensor in theirs.items()]
        sizes += [tensor.abs().max() for tensor in theirs.values()]
        classes = all(name in OUTPUTS and tensor.shape[-1] > 1 for name, tensor in theirs.items())
        equal.append(all(torch.equal(mine[n].argmax(-1), theirs[n].argmax(-1)) for n in theirs) if classes else None)
    if not equal:
        raise ValueError("there is nothing to read: no batches.")
    share = None if None in equal else sum(equal) / len(equal)
    return Agreement(len(equal), share, torch.stack(differences).max().item(), torch.stack(sizes).max().item())


def _outputs(outputs) -> dict[str, Tensor]:
    """What answers are read from, in float32."""
    names = [name for name in OUTPUTS if name in outputs] or ["last_hidden_state"]
    return {name: outputs[name].float() for name in names}
