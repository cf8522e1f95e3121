"""Sentence embeddings per second, from text to vector, of 1-bit embedders against the float one.

All contenders are the same sentence-transformers model with another transformer in it, and do the same work in
`encode`: sort by length, tokenize, run the transformer, pool. `W1A1` is the preset `rebnn-bit-w1a1` as it is loaded,
with its encoder fused; `W1A32` has float inputs and attention, `W1A8 token` is that one after `use_int8_inputs`. They
are binarized and packed without training, which does not change how long they take. The ONNX files are made here
(`pip install 'rebnn_hf[bench]'`), and int8 is dynamic: its inputs are rounded in every call.

    python benchmarks/embedder.py --embedder sentence-transformers/all-MiniLM-L6-v2 --sentences glue/STS-B/dev.tsv
"""

from __future__ import annotations

import argparse
import copy
import csv
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

import rebnn_hf
from rebnn_hf import ReBNNConfig
from rebnn_hf.benchmark import describe, missing_for_onnx, onnx_files, places, torch_int8
from rebnn_hf.kernels import backend, cpu
from rebnn_hf.timing import CLOCKS, Contender, Row, interleave, quartiles, table, threads

BASELINES = ("torch fp32", "ORT int8")
W1A1, W1A32 = "rebnn-bit-w1a1", "rebnn-w1a32"


class OnnxTransformer(nn.Module):
    """An ONNX file in the place of a transformers model.

    Args:
        path: of a graph with inputs `input_ids` and `attention_mask`, whose first output are the token states.
        config: of the model it was made from.
        number: of threads.
    """

    def __init__(self, path: Path, config, number: int):
        import onnxruntime

        super().__init__()
        self.config = config
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = number
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **kwargs) -> BaseModelOutput:
        """As of a transformers model; other inputs (token types of single sentences) say nothing new."""
        inputs = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        return BaseModelOutput(last_hidden_state=torch.from_numpy(self.session.run(None, inputs)[0]))


def with_transformer(embedder: SentenceTransformer, transformer: nn.Module) -> SentenceTransformer:
    """A copy of an embedder with another transformer in it."""
    embedder = copy.deepcopy(embedder)
    embedder[0].model = transformer
    return embedder


def packed_transformer(embedder: SentenceTransformer, preset: str, sentences: Sequence[str]) -> PreTrainedModel:
    """The embedder's transformer in 1 bit, with activation scales from sentences."""
    embedder = copy.deepcopy(embedder)
    transformer = rebnn_hf.binarize(embedder[0].auto_model, ReBNNConfig.preset(preset))
    rebnn_hf.calibrate(embedder, {"input": embedder.preprocess(list(sentences))})
    return rebnn_hf.pack(transformer).requires_grad_(False)


def packed_transformers(embedder: SentenceTransformer, sentences: Sequence[str]) -> dict[str, PreTrainedModel]:
    """Ours, by name; prints where their layers are computed."""
    models = {
        "W1A1": packed_transformer(embedder, W1A1, sentences),
        "W1A8 token": rebnn_hf.use_int8_inputs(packed_transformer(embedder, W1A32, sentences)),
        "W1A32": packed_transformer(embedder, W1A32, sentences),
    }
    tokens = embedder.preprocess(list(sentences[:1]))
    inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    for which, model in models.items():
        print(f"\n{which}\n{describe(places(model, inputs))}")
    return models


def race(embedders: dict[str, SentenceTransformer], sentences: list[str], options: argparse.Namespace) -> list[Row]:
    """Rows of one table for each size of a batch."""
    rows = []
    for batch in options.batch:
        contenders = [
            Contender(name, partial(embedder.encode, sentences, batch_size=batch))
            for name, embedder in embedders.items()
        ]
        with threads(options.threads):
            times = interleave(contenders, options.rounds, clock=CLOCKS[options.clock])
        new = [{"batch": str(batch)} | row for row in rates(times, len(sentences))]
        print(f"\n{table(new)}", flush=True)
        rows += new
    return rows


def rates(times: Mapping[str, Sequence[float]], sentences: int) -> list[Row]:
    """Sentences per second: median, quartiles, and how many times as fast as each baseline (ratio of medians)."""
    medians = {name: quartiles(seconds)[1] for name, seconds in times.items()}
    rows = []
    for name, seconds in times.items():
        high, middle, low = (sentences / value for value in quartiles(seconds))
        row = {"contender": name, "sentences/s": middle, "q1": low, "q3": high}
        rows.append(row | {f"x {base}": medians[base] / medians[name] for base in BASELINES if base in medians})
    return rows


def read_sentences(path: Path) -> list[str]:
    """The first sentences of the pairs in a .tsv file of GLUE, or the lines of a text file."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".tsv":
            return [row["sentence1"] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
        return [line.strip() for line in file if line.strip()]


def main(arguments: list[str] | None = None) -> list[Row]:
    """Prints a table for each size of a batch and returns their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embedder", default="sentence-transformers/all-MiniLM-L6-v2", help="folder or name")
    parser.add_argument("--sentences", type=Path, required=True, help="STS-B's dev.tsv, or text with one per line")
    parser.add_argument("--count", type=int, default=128, help="sentences that are embedded (default 128)")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 32], help="sentences at a time (default 1 32)")
    parser.add_argument("--threads", type=int, default=1, help="number of threads (default 1)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender (default 5)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time, for a shared machine")
    options = parser.parse_args(arguments)
    sentences = read_sentences(options.sentences)[: options.count]
    embedder = SentenceTransformer(options.embedder, device="cpu").eval()
    length = embedder.preprocess(sentences)["attention_mask"].sum(1).float().mean()
    print(
        f"torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()}), engine "
        f"{cpu.isa_name() if backend() == 'cpu' else 'not in use'}, {options.threads} thread(s), {options.rounds} "
        f"interleaved rounds, {options.clock} time; {len(sentences)} sentences of {length:.1f} tokens on average"
    )
    transformer = embedder[0].auto_model
    transformers = packed_transformers(embedder, sentences)
    transformers |= {"torch fp32": transformer, "torch int8": torch_int8(transformer)}
    with tempfile.TemporaryDirectory() as folder:
        if missing_for_onnx():
            print(f"ONNX Runtime was not run: {', '.join(missing_for_onnx())} not installed")
        else:
            for name, path in onnx_files(transformer, Path(folder)).items():
                transformers[name] = OnnxTransformer(path, transformer.config, options.threads)
        embedders = {name: with_transformer(embedder, model) for name, model in transformers.items()}
        return race(embedders, sentences, options)


if __name__ == "__main__":
    main()
