"""Bytes of a BERT-base checkpoint, float and packed, by part: the arithmetic beside the files on disk.

The weights are random (sizes do not depend on them). Matrices of the blocks, word embeddings and pooler are 1-bit, as
in the published binary BERTs; `float32` and `float16` name the type of everything else. W1A1 is the preset
`rebnn-bit-w1a1`, with 1-bit activations and attention too; its operations follow in a second table.

    python benchmarks/size.py
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification

import rebnn_hf
from rebnn_hf import ReBNNConfig
from rebnn_hf.report import packed_size

PRESETS = {"packed": "rebnn-w1a32", "packed W1A1": "rebnn-bit-w1a1"}
TYPES = {"float32": torch.float32, "float16": torch.float16}


def main(arguments: list[str] | None = None) -> list[dict[str, float | str]]:
    """Prints the table and returns its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="blocks of the encoder")
    options = parser.parse_args(arguments)
    columns = {"fp32 model": float_sizes(options.layers)}
    for title, preset in PRESETS.items():
        for name, dtype in TYPES.items():
            columns[f"{title}, rest {name}"] = packed_sizes(options.layers, preset, dtype)
    rows = [
        {"part": part} | {name: sizes[part] for name, sizes in columns.items()} for part in next(iter(columns.values()))
    ]
    print("| part | " + " | ".join(columns) + " |")
    print("|---|" + "---:|" * len(columns))
    for row in rows:
        print(f"| {row['part']} | " + " | ".join(f"{row[name]:,}" for name in columns) + " |")
    files = {name: sizes["file on disk"] for name, sizes in columns.items()}
    ratios = (f"{name}: {files['fp32 model'] / size:.1f} x smaller" for name, size in files.items())
    print("\n" + ", ".join(ratios))
    print(f"\n{rebnn_hf.operations(binarized(options.layers, PRESETS['packed W1A1']))}")
    return rows


def float_sizes(layers: int) -> dict[str, int]:
    """Parts of the float model and its file."""
    return with_file(bert_base(layers), torch.float32)


def packed_sizes(layers: int, preset: str, dtype: torch.dtype) -> dict[str, int]:
    """Parts of the packed model and its file."""
    return with_file(rebnn_hf.pack(binarized(layers, preset), dtype), dtype)


def binarized(layers: int, preset: str) -> BertForSequenceClassification:
    """The latent model, with scales of activations (if there are any) from a batch of no meaning."""
    model = rebnn_hf.binarize(bert_base(layers), ReBNNConfig.preset(preset, word_embeddings=True, pooler=True))
    rebnn_hf.calibrate(model, {"input_ids": torch.arange(8)[None]})
    return model


def with_file(model: BertForSequenceClassification, dtype: torch.dtype) -> dict[str, int]:
    """Bytes by arithmetic (`packed_size`), and of the file that `save_pretrained` writes, its header included."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        files = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    sizes = packed_size(model, dtype)
    return {"tensors, " + part if part == "total" else part: size for part, size in sizes.items()} | {
        "file on disk": files
    }


def bert_base(layers: int) -> BertForSequenceClassification:
    """BERT-base with two labels and random weights."""
    return BertForSequenceClassification(BertConfig(num_hidden_layers=layers, num_labels=2))


if __name__ == "__main__":
    main()
