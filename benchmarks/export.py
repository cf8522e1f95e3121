"""1-bit encoders as ONNX files in ONNX Runtime, beside the engine and beside float files: size, logits, time.

All models have the shape asked for and random weights, which do not change how long they take. `W1A32` is the preset
`rebnn-w1a32` (float inputs and attention), `W1A1` is `rebnn-bit-w1a1`. `engine` is the packed model as it is loaded;
`ONNX` is what `rebnn_hf.export_onnx` makes of it, run by ONNX Runtime through the standard operators that its functions
are made of. `torch fp32` and `ORT fp32` are W1A32 after `rebnn_hf.unpack`, the same function in float, and `ORT int8`
is that file dynamically quantized. W1A1 has no float twin: those are what it is raced against, not what it computes.

The first table says how large each file is (word embeddings stay float, but for `ORT int8`), how long it took to load
(once), and how near its logits of random texts come to those of the model it was made from. The others are times.

    python benchmarks/export.py                              # the shape of MiniLM-L6
    python benchmarks/export.py --layers 12 --hidden 768 --intermediate 3072
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, PreTrainedModel

import rebnn_hf
from rebnn_hf import ReBNNConfig
from rebnn_hf.benchmark import onnx_call, onnx_files
from rebnn_hf.integrations.onnx import PACKAGES
from rebnn_hf.kernels import backend, cpu
from rebnn_hf.timing import CLOCKS, Contender, Row, compare, interleave, table, threads

PRESETS = {"W1A32": "rebnn-w1a32", "W1A1": "rebnn-bit-w1a1"}
MADE_FROM = {
    "W1A1 engine": "W1A1 engine",
    "W1A1 ONNX": "W1A1 engine",
    "W1A32 engine": "torch fp32",
    "W1A32 ONNX": "W1A32 engine",
    "torch fp32": "torch fp32",
    "ORT fp32": "torch fp32",
    "ORT int8": "ORT fp32",
}
"""Contender -> the one whose logits it should have."""
BASELINES = ("torch fp32", "ORT fp32", "ORT int8")


@dataclass(frozen=True)
class Saved:
    """A contender on disk.

    Args:
        file: its weights.
        prepare: loads it for inputs; what it returns runs once, and gives logits first.
    """

    file: Path
    prepare: Callable[[Mapping[str, Tensor]], Callable[[], object]]


def packed_model(options: argparse.Namespace, preset: str) -> PreTrainedModel:
    """Of the shape asked for, with scales from random tokens."""
    config = BertConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        intermediate_size=options.intermediate,
    )
    model = BertForSequenceClassification(config).eval()
    rebnn_hf.binarize(model, ReBNNConfig.preset(preset))
    rebnn_hf.calibrate(model, random_texts(options, 2, 32))
    return rebnn_hf.pack(model).requires_grad_(False)


def save(options: argparse.Namespace, folder: Path) -> dict[str, Saved]:
    """Make all models and files."""
    packed = {name: packed_model(options, preset) for name, preset in PRESETS.items()}
    saved = {}
    for name, model in packed.items():
        rebnn_hf.export_onnx(model, folder / f"{name}.onnx")
        saved[f"{name} ONNX"] = onnx_file(folder / f"{name}.onnx", options.threads)
        saved[f"{name} engine"] = torch_folder(model, folder / name)
    floats = rebnn_hf.unpack(packed["W1A32"])
    saved["torch fp32"] = torch_folder(floats, folder / "fp32")
    saved |= {name: onnx_file(file, options.threads) for name, file in onnx_files(floats, folder).items()}
    return {name: saved[name] for name in MADE_FROM}


def torch_folder(model: PreTrainedModel, folder: Path) -> Saved:
    """A model as its users load it."""
    model.save_pretrained(folder)

    def prepare(inputs: Mapping[str, Tensor]) -> Callable[[], object]:
        return partial(_tuple, AutoModelForSequenceClassification.from_pretrained(folder).eval(), inputs)

    return Saved(folder / "model.safetensors", prepare)


def _tuple(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    return model(**inputs, return_dict=False)


def onnx_file(file: Path, number: int) -> Saved:
    """A file for ONNX Runtime with so many threads."""
    return Saved(file, partial(onnx_call, file, number=number))


def random_texts(options: argparse.Namespace, batch: int, length: int) -> dict[str, Tensor]:
    """Random tokens without padding, int64 [batch, length]."""
    ids = torch.randint(options.vocabulary, (batch, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def files(contenders: Mapping[str, Saved], inputs: Mapping[str, Tensor]) -> list[Row]:
    """Rows of the first table: what is on disk, how long it loads, and what it answers."""
    logits, seconds = {}, {}
    for name, saved in contenders.items():
        start = time.perf_counter()
        call = saved.prepare(inputs)
        seconds[name] = time.perf_counter() - start
        with torch.inference_mode():
            logits[name] = torch.as_tensor(call()[0])
    rows = []
    for name, saved in contenders.items():
        ours, theirs = logits[name], logits[MADE_FROM[name]]
        row = {"contender": name, "file MB": saved.file.stat().st_size / 1e6, "load s": seconds[name]}
        row |= {"logits as": MADE_FROM[name], "largest difference": (ours - theirs).abs().max().item()}
        equal = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
        rows.append(row | {"largest logit": theirs.abs().max().item(), "equal answers": f"{equal:.1%}"})
    return rows


def speed(contenders: Mapping[str, Saved], options: argparse.Namespace, batch: int, length: int) -> list[Row]:
    """Rows of one table of times."""
    inputs = random_texts(options, batch, length)
    calls = [Contender(name, saved.prepare(inputs)) for name, saved in contenders.items()]
    with threads(options.threads), torch.inference_mode():
        times = interleave(calls, options.rounds, clock=CLOCKS[options.clock])
    size = {"batch x tokens": f"{batch} x {length}", "threads": options.threads}
    return [size | row for row in compare(times, BASELINES)]


def main(arguments: list[str] | None = None) -> dict[str, list[Row]]:
    """Prints the tables and returns their rows, by table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6, help="blocks of the encoder (default 6)")
    parser.add_argument("--hidden", type=int, default=384, help="width (default 384)")
    parser.add_argument("--heads", type=int, default=12, help="attention heads (default 12)")
    parser.add_argument("--intermediate", type=int, default=1536, help="width in feed-forward blocks (default 1536)")
    parser.add_argument("--vocabulary", type=int, default=30522, help="tokens (default 30522)")
    parser.add_argument("--size", nargs="+", default=["1x128"], help="batch x tokens (default 1x128)")
    parser.add_argument("--texts", type=int, default=32, help="random texts of 32 tokens to compare logits of")
    parser.add_argument("--threads", type=int, default=1, help="number of threads (default 1)")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contender (default 9)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time, for a shared machine")
    options = parser.parse_args(arguments)
    missing = [name for name in (*PACKAGES, "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"{', '.join(missing)} not installed: pip install 'rebnn_hf[bench,onnx]'")
    import onnxruntime

    print(
        f"torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()}), onnxruntime "
        f"{onnxruntime.__version__}, engine {cpu.isa_name() if backend() == 'cpu' else 'not in use'}, "
        f"{options.threads} thread(s), {options.rounds} interleaved rounds, {options.clock} time; {options.layers} "
        f"layers of {options.hidden} x {options.intermediate}"
    )
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        contenders = save(options, Path(folder))
        tables = {"files": files(contenders, random_texts(options, options.texts, 32)), "speed": []}
        print(f"\n{table(tables['files'])}", flush=True)
        for batch, length in (map(int, size.split("x")) for size in options.size):
            tables["speed"] += (new := speed(contenders, options, batch, length))
            print(f"\n{table(new)}", flush=True)
    return tables


if __name__ == "__main__":
    main()
