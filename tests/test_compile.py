"""Whole packed models through `torch.compile` and `torch.export`: one graph for all sizes, saved and loaded.

Single layers and operators are tested in test_kernels, test_fusion and test_conv_kernel.
"""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch._dynamo.backends.debugging import aot_eager

import rebnn_hf
from rebnn_hf import ReBNNConfig, fusion
from rebnn_hf.inputs import random_inputs
from rebnn_hf.kernels import cpu

ROOT = Path(__file__).parents[1]
SIZES = dict(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=52,
    max_position_embeddings=40,
    initializer_range=0.2,
)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.why_not())


@pytest.fixture(scope="module", params=["W1A32", "W1A1 in one call", "W1A1 layer by layer"])
def case(request):
    """A packed model and the operator its blocks must appear as."""
    torch.manual_seed(0)
    model = hf.BertForSequenceClassification(hf.BertConfig(**SIZES)).eval()
    preset = "rebnn-w1a32" if request.param == "W1A32" else "rebnn-bit-w1a1"
    rebnn_hf.binarize(model, ReBNNConfig.preset(preset, word_embeddings=True))
    rebnn_hf.calibrate(model, batch(model, 3, 11))
    rebnn_hf.pack(model)
    if request.param == "W1A1 layer by layer":
        fusion.fuse(model, False)
    assert fusion.is_fused(model) == (request.param == "W1A1 in one call")
    return model, "rebnn.encoder" if fusion.is_fused(model) else "rebnn.linear"


def batch(model, size, length):
    inputs = random_inputs(model, size, length)
    inputs["attention_mask"][-1, (length + 1) // 2 :] = 0
    return inputs


@torch.no_grad()
def test_compiled_without_a_break_it_gives_the_same_logits_for_every_size(case):
    model, operator = case
    batches = [batch(model, 3, 11), batch(model, 2, 7), batch(model, 5, 39)]
    expected = [model(**inputs).logits for inputs in batches]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return aot_eager(graph, inputs)

    torch.compiler.reset()
    compiled = torch.compile(copy.copy(model), backend=backend, fullgraph=True, dynamic=True)
    for inputs, logits in zip(batches, expected, strict=True):
        torch.testing.assert_close(compiled(**inputs).logits, logits, **TOLERANCE)
        if inputs is batches[0]:
            del graphs[:-1]  # the first call may start over, once it knows which numbers of the modules are fixed
    assert len(graphs) == 1 and f"ops.{operator}" in graphs[0] and "ops.rebnn.embedding" in graphs[0]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler")
@torch.no_grad()
def test_inductor_compiles_the_whole_model():
    """What `torch.compile(model, fullgraph=True)` is to its users."""
    torch.manual_seed(0)
    model = rebnn_hf.pack(rebnn_hf.binarize(hf.BertForSequenceClassification(hf.BertConfig(**SIZES)).eval()))
    inputs = batch(model, 3, 11)
    expected = model(**inputs).logits
    torch.compiler.reset()
    compiled = torch.compile(copy.copy(model), fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).logits, expected, **TOLERANCE)


@torch.no_grad()
def test_exported_saved_and_loaded_it_gives_the_same_logits_for_every_size(case, tmp_path):
    model, operator = case
    example = batch(model, 3, 11)
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=40)}
    model(**example)
    program = torch.export.export(model, (), example, dynamic_shapes={name: sizes for name in example})
    assert operator in program.graph_module.code
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for inputs in (example, batch(model, 2, 7), batch(model, 5, 40)):
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, **TOLERANCE)


LOAD = """
import sys
import torch
{imports}
try:
    program = torch.export.load(sys.argv[1] + "/model.pt2").module()
except RuntimeError as error:
    sys.exit(f"refused: {{error}}")
with torch.no_grad():
    found = program(**torch.load(sys.argv[1] + "/inputs.pt")).logits
torch.testing.assert_close(found, torch.load(sys.argv[1] + "/logits.pt"), rtol=1e-5, atol=1e-5)
print("equal")
"""


@torch.no_grad()
def test_another_process_needs_the_import_and_nothing_else(tmp_path):
    torch.manual_seed(0)
    model = rebnn_hf.pack(rebnn_hf.binarize(hf.BertForSequenceClassification(hf.BertConfig(**SIZES)).eval()))
    inputs = batch(model, 2, 7)
    torch.export.save(torch.export.export(model, (), inputs), tmp_path / "model.pt2")
    torch.save(inputs, tmp_path / "inputs.pt")
    torch.save(model(**inputs).logits, tmp_path / "logits.pt")
    done = subprocess.run(
        [sys.executable, "-c", LOAD.format(imports="import rebnn_hf"), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stdout == "equal\n", done.stderr
