"""Saved image models as strangers meet them: the command line, model cards, and what `import timm` brings with it."""

import json

import fresh_process
import pytest
import torch

pytest.importorskip("timm", reason="needs the extra rebnn_hf[detection]")
pytest.importorskip("torchvision", reason="needs the extra rebnn_hf[detection]")

from huggingface_hub import ModelCard
from transformers import (
    AutoModelForImageClassification,
    AutoModelForObjectDetection,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)

import rebnn_hf
from rebnn_hf import cli
from rebnn_hf.kernels import use_backend
from rebnn_hf.vision.detection import FasterRCNNConfig, FasterRCNNForObjectDetection

SMALL = {"min_size": 64, "max_size": 64, "fpn_channels": 8, "head_size": 16, "anchor_sizes": [8, 16, 32, 64, 128]}
CONVOLUTIONS = 16  # with 1-bit weights in a ResNet-18


def classifier():
    torch.manual_seed(0)
    config = TimmWrapperConfig(architecture="rebnn_resnet18", num_labels=4, model_args={"stem": "cifar"})
    return TimmWrapperForImageClassification(config).eval()


def detector():
    torch.manual_seed(0)
    return FasterRCNNForObjectDetection(FasterRCNNConfig(backbone="rebnn_resnet18", num_labels=2, **SMALL)).eval()


MODELS = {
    "classifier": (classifier, AutoModelForImageClassification),
    "detector": (detector, AutoModelForObjectDetection),
}


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    """A latent and a packed folder, what loads them, and the outputs of the latent model."""
    build, auto = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    model = rebnn_hf.binarize(build())
    model.save_pretrained(folder / "latent")
    expected = outputs(model)
    rebnn_hf.pack(model).save_pretrained(folder / "packed")
    return folder, auto, expected


def outputs(model):
    """Of the reference, which computes latent and packed weights alike."""
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), use_backend("reference"):
        found = model.eval()(images)
    return found["logits"] if "logits" in found else found["detections"][0]["boxes"]


# The command line

COMMANDS = """
import contextlib, io, json, sys
from rebnn_hf.cli import main
found = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as error:
        code = main(arguments)
    found.append((code, out.getvalue() + error.getvalue()))
print(json.dumps(found))
"""


def rebnn(*commands):
    """Exit code and what was printed of each command, all in one new process."""
    return json.loads(fresh_process.run(COMMANDS, json.dumps([list(map(str, command)) for command in commands])))


def test_info_pack_and_unpack(saved, tmp_path):
    folder, auto, expected = saved
    info, pack, unpack = rebnn(
        ("info", folder / "packed", "--json"),
        ("pack", folder / "latent", tmp_path / "packed"),
        ("unpack", folder / "packed", tmp_path / "float"),
    )
    assert info[0] == 0, info[1]
    found, model = json.loads(info[1]), auto.from_pretrained(folder / "packed")
    assert (found["state"], found["class"]) == ("packed", type(model).__name__)
    assert [row["type"] for row in found["rows"]].count("PackedConv2d") == CONVOLUTIONS
    assert found["totals"] == rebnn_hf.summary(model).totals
    assert found["file_bytes"] == (folder / "packed" / "model.safetensors").stat().st_size

    assert pack[0] == 0 and "Written to" in pack[1], pack[1]
    assert torch.equal(outputs(auto.from_pretrained(tmp_path / "packed")), expected)
    files = [path / "model.safetensors" for path in (tmp_path / "packed", folder / "packed")]
    assert files[0].read_bytes() == files[1].read_bytes()

    assert unpack[0] == 2 and "cannot compute activation='rsign'" in unpack[1], unpack[1]
    assert not (tmp_path / "float").exists()


def test_unpack_of_float_activations(tmp_path):
    torch.manual_seed(0)
    model = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="test_resnet", num_labels=4)).eval()
    rebnn_hf.pack(rebnn_hf.binarize(model)).save_pretrained(tmp_path / "packed")
    assert cli.main(["unpack", str(tmp_path / "packed"), str(tmp_path / "float")]) == 0
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "float")
    assert not hasattr(plain.config, "quantization_config")
    torch.testing.assert_close(outputs(plain), outputs(model))


# Model cards

RUN_CARD = """
import re, sys
from pathlib import Path
(code,) = re.findall(r"```python\\n(.*?)```", Path(sys.argv[1]).read_text(), re.DOTALL)
exec(compile(code, "README.md", "exec"))
print(type(model).__name__, sum(type(module).__name__ == "PackedConv2d" for module in model.modules()))
"""


def test_the_code_of_a_card_loads_the_model(saved):
    folder, auto, _ = saved
    model = auto.from_pretrained(folder / "packed")
    rebnn_hf.model_card(model, str(folder / "packed")).save(folder / "card.md")
    assert fresh_process.run(RUN_CARD, folder / "card.md") == f"{type(model).__name__} {CONVOLUTIONS}\n"


def test_a_card_names_the_library_that_loads_the_model(saved, tmp_path):
    folder, auto, _ = saved
    rebnn_hf.model_card(auto.from_pretrained(folder / "packed")).save(tmp_path / "card.md")
    data = ModelCard.load(tmp_path / "card.md").data
    own = auto is AutoModelForObjectDetection
    assert data.library_name == ("rebnn_hf" if own else "transformers")
    assert data.pipeline_tag == (None if own else "image-classification")


# Behind `import timm`


def test_timm_that_was_there_first_learns_our_models_too():
    code = "import timm\nimport rebnn_hf\nprint(timm.list_models('rebnn_*'))"  # the other order: all tests above
    assert fresh_process.run(code) == "['rebnn_reactnet_a', 'rebnn_resnet18', 'rebnn_resnet34']\n"
