"""Whole 1-bit encoders, from token ids to logits, against the float model in torch and in ONNX Runtime.

Weights are random (they do not change how long a model takes), the 1-bit model is the preset `rebnn-bit-w1a1`. Rows
`W1A1` are the packed model as it is loaded, with its encoder fused; `W1A1 layered` the same layer by layer; `W1A32`
has float inputs and attention, `W1A8 token` is that one after `use_int8_inputs`. torch fp32 is eager.

Tables of `speed`, of `padding` (a batch of 8 in which lengths go from an eighth to the whole, beside batches without
padding) and of `memory` (what loading a checkpoint and one forward pass of 1 x 128 add to the resident memory of a
process that has used a small model before, once every tensor was read; word embeddings and pooler are 1-bit too).

    python benchmarks/encoder.py --threads 1 2
    python benchmarks/encoder.py --model minilm-l6 --size 1x128 --tables speed
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, BertConfig, PreTrainedModel

import rebnn_hf
from rebnn_hf import ReBNNConfig
from rebnn_hf.benchmark import FloatModels, describe, layered, missing_for_onnx, places, race
from rebnn_hf.inputs import random_inputs
from rebnn_hf.kernels import backend, cpu
from rebnn_hf.timing import CLOCKS, Contender, Row, compare, interleave, table, threads

MODELS = {
    "bert-base": BertConfig(),
    "minilm-l6": BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
    "tiny": BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    ),
}
W1A1, W1A32 = "rebnn-bit-w1a1", "rebnn-w1a32"
SIZES = ["1x128", "8x128", "1x32"]
TABLES = ("speed", "padding", "memory")


def float_model(name: str) -> PreTrainedModel:
    """With random weights."""
    config = copy.deepcopy(MODELS[name])  # 1-bit attention changes it
    return AutoModelForSequenceClassification.from_config(config).eval()


def packed_model(name: str, preset: str, **overrides) -> PreTrainedModel:
    """Packed, with scales from random tokens."""
    model = rebnn_hf.binarize(float_model(name), ReBNNConfig.preset(preset, **overrides)).eval()
    rebnn_hf.calibrate(model, random_inputs(model, 2, 32))
    return rebnn_hf.pack(model).requires_grad_(False)


def speed(name: str, options: argparse.Namespace) -> list[Row]:
    """All contenders, for all sizes and numbers of threads."""
    fused = packed_model(name, W1A1)
    packed = {"W1A1": fused, "W1A1 layered": layered(fused)}
    packed["W1A8 token"] = rebnn_hf.use_int8_inputs(packed_model(name, W1A32))
    packed["W1A32"] = packed_model(name, W1A32)
    for which, model in packed.items():
        print(f"\n{name}, {which}\n{describe(places(model, random_inputs(model, 1, 8)))}")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        floats = FloatModels(float_model(name), Path(options.onnx or temporary) / name)
        for batch, length in map(size, options.size):
            for number in options.threads:
                inputs = random_inputs(fused, batch, length)
                new = race(packed, floats, inputs, number, options.rounds, CLOCKS[options.clock])
                rows += [{"model": name} | row for row in new]
                print(f"\n{name}\n{table(new)}", flush=True)
    return rows


def padding(name: str, options: argparse.Namespace) -> list[Row]:
    """A batch of mixed lengths, beside full batches: one of the same shape, one of the same tokens."""
    models = {"W1A1": packed_model(name, W1A1), "torch fp32": float_model(name)}
    model = models["W1A1"]
    lengths = torch.arange(1, 9) * options.padded // 8
    padded = random_inputs(model, 8, options.padded)
    padded["attention_mask"] = (torch.arange(options.padded) < lengths[:, None]).long()
    batches = {
        f"8 x {options.padded}": random_inputs(model, 8, options.padded),
        f"{lengths.sum()} tokens padded to 8 x {options.padded}": padded,
        f"8 x {lengths.sum() // 8}": random_inputs(model, 8, int(lengths.sum()) // 8),
    }
    rows = []
    for number in options.threads:
        for which, model in models.items():
            contenders = [Contender(words, partial(model, **inputs)) for words, inputs in batches.items()]
            with threads(number), torch.inference_mode():
                times = interleave(contenders, options.rounds, clock=CLOCKS[options.clock])
            new = [{"model": which, "threads": number} | row for row in compare(times, [next(iter(batches))])]
            rows += [{"shape": name} | row for row in new]
            print(f"\n{name}\n{table(new)}", flush=True)
    return rows


RESIDENT = """
import sys, torch, rebnn_hf
from transformers import AutoModelForSequenceClassification

def resident():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS")))

def run(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.inference_mode():
        model(input_ids=torch.zeros(1, 128, dtype=torch.long))
        for ids in torch.arange(model.config.vocab_size).split(128):
            model.get_input_embeddings()(ids)  # files are mapped: what was never read takes no memory
    return model

torch.set_num_threads(1)
small = run(sys.argv[1])
before = resident()
model = run(sys.argv[2])
print(resident() - before)
"""


def memory(name: str, options: argparse.Namespace) -> list[Row]:
    """Resident memory, in MiB, of a model that has run once and has read every token, in processes of their own."""
    everything = {"word_embeddings": True, "pooler": True}
    makers = {"float32": float_model, "W1A1": partial(packed_model, preset=W1A1, **everything)}
    found: dict[str, list[float]] = {which: [] for which in makers}
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for which, maker in makers.items():
            for model in ("tiny", name):
                maker(model).save_pretrained(f"{folder}/{which}/{model}")
            files[which] = sum(p.stat().st_size for p in Path(folder, which, name).glob("*.safetensors")) / 2**20
        for _ in range(options.processes):
            for which, values in found.items():
                paths = (f"{folder}/{which}/{model}" for model in ("tiny", name))
                command = [sys.executable, "-c", RESIDENT, *paths]
                result = subprocess.run(command, capture_output=True, text=True, check=True)
                values.append(int(result.stdout) / 2**10)
    medians = {which: statistics.median(values) for which, values in found.items()}
    rows = [
        {
            "model": f"{name} {which}",
            "file MiB": files[which],
            "resident MiB": medians[which],
            "lowest": min(values),
            "highest": max(values),
            "x less": medians["float32"] / medians[which],
        }
        for which, values in found.items()
    ]
    print(f"\n{table(rows)}")
    return rows


def size(text: str) -> tuple[int, int]:
    """Batch and length."""
    batch, length = map(int, text.split("x"))
    return batch, length


def main(arguments: list[str] | None = None) -> dict[str, list[Row]]:
    """Prints the tables and returns their rows, by table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["bert-base", "minilm-l6"])
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--size", nargs="+", default=SIZES, help="batch x tokens, e.g. 1x128")
    parser.add_argument("--threads", nargs="+", type=int, default=[1], help="numbers of threads (default 1)")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contender (default 9)")
    parser.add_argument("--padded", type=int, default=128, help="length of the batch with padding (default 128)")
    parser.add_argument("--processes", type=int, default=3, help="of each model, to measure memory (default 3)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time, for a shared machine")
    parser.add_argument("--onnx", help="folder to keep the ONNX files in, for the next run")
    options = parser.parse_args(arguments)
    print(
        f"torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()}), engine "
        f"{cpu.isa_name() if backend() == 'cpu' else 'not in use'}, {options.rounds} interleaved rounds, "
        f"{options.clock} time"
    )
    if missing_for_onnx():
        print(
            f"ONNX Runtime was not run: {', '.join(missing_for_onnx())} not installed (pip install 'rebnn_hf[bench]')"
        )
    torch.manual_seed(0)
    functions = {"speed": speed, "padding": padding, "memory": memory}
    return {t: [row for name in options.model for row in functions[t](name, options)] for t in options.tables}


if __name__ == "__main__":
    main()
