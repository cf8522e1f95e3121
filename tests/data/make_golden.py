"""Write a golden packed checkpoint: `python tests/data/make_golden.py tests/data/golden_v2`.

Every number follows from a formula of integers, exact in float32: no random generator, no rounding. Each was made once,
with the format version in its name, and never again; a test holds that this script, the files and the loader still
agree.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification

from rebnn_hf import ReBNNConfig, binarize, pack

METHODS = {
    "golden_v1": ReBNNConfig(word_embeddings=True),
    "golden_v2": ReBNNConfig.preset("rebnn-bit-w1a1", word_embeddings=True),
}

INPUT_IDS = [[2, 5, 7, 11, 13, 3], [1, 17, 4, 4, 18, 0]]


def value(number: int, index: int) -> float:
    """Element `index` of tensor `number`: a multiple of 1/32 from -1 to 1; some are zero, whose sign is +1."""
    return ((7 * index * (index + number) + 37 * index + 11 * number) % 65 - 32) / 32


def scale(number: int, row: int) -> float:
    """Scale of a row: a multiple of 1/32 from 1/32 to 7/32."""
    return (1 + (3 * row + number) % 7) / 32


def fill(name: str, number: int, shape: torch.Size) -> torch.Tensor:
    """Contents of one tensor of the latent model."""
    count = shape.numel()
    if name.endswith("scale"):
        values = [scale(number, row) for row in range(count)]
    elif name.endswith("LayerNorm.weight"):
        values = [1 + value(number, index) / 4 for index in range(count)]
    else:
        values = [value(number, index) for index in range(count)]
    return torch.tensor(values, dtype=torch.float32).reshape(shape)


def latent_model(name: str) -> BertForSequenceClassification:
    """A tiny BERT with binary word embeddings; rows of 12 and 20 signs, so that bytes have spare bits."""
    config = BertConfig(
        vocab_size=19,
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=6,
        type_vocab_size=1,
        num_labels=3,
    )
    model = binarize(BertForSequenceClassification(config), METHODS[name]).eval()
    tensors = sorted(name for name in model.state_dict() if not name.endswith("balance"))
    model.load_state_dict({n: fill(n, i, model.state_dict()[n].shape) for i, n in enumerate(tensors)}, strict=False)
    return model


def main(folder: Path) -> None:
    """Save the packed model, its inputs and logits, and its bits as hexadecimal text."""
    model = pack(latent_model(folder.name))
    model.save_pretrained(folder)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(INPUT_IDS)).logits
    bits = {n: t.numpy().tobytes().hex() for n, t in model.state_dict().items() if t.dtype == torch.uint8}
    expected = {"input_ids": INPUT_IDS, "logits": logits.tolist(), "bits": bits}
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
