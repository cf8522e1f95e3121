"""Whether an installed wheel keeps its promise: `python check_wheel.py BACKEND`, in an environment of its own.

BACKEND is what packed models have to run on there: `cpu`, the C library that the wheel brings, or `reference`, torch,
where it brings none.
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

import rebnn_hf
from rebnn_hf import kernels


def main(backend: str) -> None:
    """Packs, saves and loads a small model, and asks it.

    Raises:
        SystemExit: The package is not that of the wheel, or runs on another backend.
    """
    package = Path(rebnn_hf.__file__).parent
    if not package.is_relative_to(sys.prefix):
        raise SystemExit(f"{package} is not in {sys.prefix}: this is not the package that was installed.")
    if kernels.backend() != backend:
        raise SystemExit(f"backend {kernels.backend()} in place of {backend}. {kernels.cpu.why_not()}")
    check_answers(load_packed())
    print(f"{package}: a packed model runs on backend {backend}.")


@torch.no_grad()
def check_answers(model: BertForSequenceClassification) -> None:
    """Compares a layer with plain torch, and lets the whole model answer.

    Raises:
        SystemExit: The answers are no numbers.
    """
    layer, inputs = model.bert.encoder.layer[0].intermediate.dense, torch.randn(4, 64)
    found = layer(inputs)
    with kernels.use_backend("reference"):
        torch.testing.assert_close(found, layer(inputs))
    logits = model(torch.arange(8)[None]).logits
    if not logits.isfinite().all():
        raise SystemExit(f"the model answers {logits}.")


def load_packed() -> BertForSequenceClassification:
    """A small model with 1-bit weights, activations and attention, from its file."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
    model = BertForSequenceClassification(BertConfig(**sizes))
    rebnn_hf.binarize(model, rebnn_hf.ReBNNConfig.preset("rebnn-bit-w1a1"))
    rebnn_hf.calibrate(model, {"input_ids": torch.arange(8)[None]})
    with tempfile.TemporaryDirectory() as folder:
        rebnn_hf.pack(model).save_pretrained(folder)
        return AutoModelForSequenceClassification.from_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
