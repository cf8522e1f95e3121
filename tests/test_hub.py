"""Pushing to and loading from a Hub: real users in processes of their own (hub_users), a real server (hub_server)."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from hub_server import Hub, serving
from huggingface_hub import ModelCard

from rebnn_hf import allow_loading_without_import, binarize, pack, unpack
from rebnn_hf.config import FORMAT_VERSION

TESTS = Path(__file__).parent
TOKENS = {"user-writes": ("user", "write"), "user-reads": ("user", "read"), "other-writes": ("other", "write")}


class Users:
    """Lets users do their parts, once each, in the order of their need."""

    def __init__(self, folder):
        self.folder, self.reports = folder, {}
        self.hub = Hub(folder / "hub", TOKENS)
        for name in ("hub", "work"):
            (folder / name).mkdir()

    def play(self, role, home, **environment):
        """The report of a role, on the machine `home`."""
        settings = {"HF_HOME": str(self.folder / home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        done = subprocess.run(
            [sys.executable, TESTS / "hub_users.py", role, self.folder / "work"],
            env={**inherited, "PYTHONPATH": str(TESTS.parent), **settings, **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-6000:]
        return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def users(tmp_path_factory):
    users = Users(tmp_path_factory.mktemp("users"))
    with serving(users.hub) as url:
        users.published = users.play("publish", "publisher", HF_ENDPOINT=url, HF_TOKEN="user-writes")
        users.read = users.play("read", "reader", HF_ENDPOINT=url)
        users.stumbled = users.play("stumble", "stranger", HF_ENDPOINT=url)
    seen = len(users.hub.requests)
    users.offline = users.play("read_offline", "reader", HF_ENDPOINT=url, HF_HUB_OFFLINE="1")
    assert len(users.hub.requests) == seen
    return users


# What is on the Hub


def test_files(users):
    files = users.hub.files("user/model")
    assert files == ["README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    shards = [file for file in users.hub.files("user/sharded") if re.fullmatch(r"model-.*\.safetensors", file)]
    assert len(shards) > 2 and "model.safetensors.index.json" in users.hub.files("user/sharded")
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= set(users.hub.files("user/trained"))
    assert not [file for file in users.hub.files("user/trained") if "checkpoint-" in file]
    config = json.loads(users.hub.content("user/model", "config.json"))["quantization_config"]
    assert config["state"] == "packed" and config["format_version"] == FORMAT_VERSION
    assert json.loads(users.hub.content("user/latent", "config.json"))["quantization_config"]["state"] == "latent"


def test_what_is_pushed_is_what_is_saved(users):
    saved = (users.folder / "work" / "packed" / "model.safetensors").read_bytes()
    assert users.hub.content("user/model", "model.safetensors") == saved
    assert users.hub.content("user/model", "model.safetensors", "v2") != saved


def test_pushes_without_the_right_are_refused(users):
    assert "403 Forbidden" in users.published["read-only token"][1]
    assert "403 Forbidden" in users.published["somebody else"][1]
    assert "401 Unauthorized" in users.published["no token"][1]
    assert "user/new" not in users.hub.repos


def test_card_of_docs(users):
    text = users.hub.content("user/model", "README.md").decode()
    card = ModelCard(text)
    fields = card.data.to_dict()
    assert fields["base_model"] == "user/teacher" and fields["license"] == "apache-2.0"
    assert fields["tags"] == ["rebnn", "1-bit"] and fields["pipeline_tag"] == "text-classification"
    told = re.search(r"metric_value=([\d.]+)", (TESTS.parent / "docs" / "hub.md").read_text())
    assert [(r.metric_type, r.metric_value) for r in card.data.eval_results] == [("accuracy", float(told[1]))]
    assert 'AutoModelForSequenceClassification.from_pretrained("user/model")' in card.text
    assert "python evaluate.py --task sst2 --model user/model" in card.text
    assert f"{users.published['parameters']:,} parameters" in card.text
    assert users.published["counted by the Hub"] < users.published["parameters"]


def test_a_later_push_leaves_the_card(users):
    assert users.hub.content("user/model", "README.md", "v2") == users.hub.content("user/model", "README.md")


def test_card_of_a_plain_push_has_the_tags(users):
    assert ModelCard(users.hub.content("user/sharded", "README.md").decode()).data.tags == ["rebnn", "1-bit"]
    assert not ModelCard(users.hub.content("user/teacher", "README.md").decode()).data.tags


def test_card_of_the_trainer(users):
    card = ModelCard(users.hub.content("user/trained", "README.md").decode())
    assert {"rebnn", "1-bit", "generated_from_trainer"} <= set(card.data.tags)
    assert card.data.license == "mit" and card.data.language == ["en"]
    assert "learning_rate: " in card.text, "what transformers writes of the training"
    assert "stored as one bit each" in card.text and "PackedLinear" in card.text
    assert 'AutoModelForSequenceClassification.from_pretrained("user/trained")' in card.text


# Loading


@pytest.mark.parametrize(
    ("loaded", "pushed"),
    [
        ("user/model", "user/model"),
        ("user/model, local files", "user/model"),
        ("user/model, commit", "user/model"),
        ("user/model, branch v2", "other"),
        ("user/sharded", "other"),
        ("user/collection", "other"),
        ("user/latent", "user/latent"),
        ("user/trained", "user/trained"),
        ("user/self-loading", "user/model"),
    ],
)
def test_logits_are_those_from_before_the_push(users, loaded, pushed):
    assert users.read["logits"][loaded] == users.published["logits"][pushed]


def test_code_of_docs(users):
    assert users.published["logits"]["docs"] == users.published["logits"]["user/model"]


def test_models_differ(users):
    logits = [json.dumps(users.published["logits"][name]) for name in ("user/model", "other", "user/latent")]
    assert len({*logits, json.dumps(users.published["logits"]["user/trained"])}) == 4


def test_states_and_the_engine(users):
    assert users.read["packed"] == 13 and users.read["latent"] == 12
    assert users.read["fused"]


def test_tokenizer_and_pipeline(users):
    assert users.read["tokens"] == [4, 5, 6]
    assert users.read["classified"] == users.published["classified"]
    assert 0 < users.published["classified"][0]["score"] < 1


def test_local_files_only_asks_nobody(users):
    requests = users.hub.requests
    start, end = (requests.index(f"GET /{mark}") for mark in ("local-files-only", "may-ask-again"))
    assert requests[start + 1 : end] == []
    assert users.read["not in the cache"][0] == "OSError"


def test_private_models_need_a_token_of_their_user(users):
    for who in ("private", "private, by somebody else"):
        error, message = users.read[who]
        assert error == "OSError" and "user/latent is not a local folder and is not a valid model" in message
    assert users.hub.repos["user/latent"].private and not users.hub.repos["user/model"].private


@pytest.mark.parametrize(
    ("what", "error", "words"),
    [
        ("no such revision", "OSError", "v3 is not a valid git identifier"),
        ("no such model", "OSError", "user/nothing is not a local folder and is not a valid model"),
        ("no such subfolder", "ValueError", "Unrecognized model in user/collection"),
    ],
)
def test_mistaken_names(users, what, error, words):
    assert users.read[what][0] == error and words in users.read[what][1]


@pytest.mark.parametrize(
    ("loaded", "pushed"),
    [
        ("user/model", "user/model"),
        ("user/model, branch v2", "other"),
        ("user/sharded", "other"),
        ("user/collection", "other"),
        ("user/latent", "user/latent"),
    ],
)
def test_offline(users, loaded, pushed):
    assert users.offline["logits"][loaded] == users.published["logits"][pushed]


def test_offline_pipeline_and_what_is_not_there(users):
    assert users.offline["classified"] == users.published["classified"]
    assert users.offline["not in the cache"][0] == "OSError"


# Without the import


REFUSAL = (
    "Unknown fusion type: none, for this is a 1-bit checkpoint of the package rebnn_hf: `pip install rebnn_hf`, and "
    "`import rebnn_hf` before loading it"
)
"""Of transformers, with our sentence in it."""


@pytest.mark.parametrize("model", ["packed", "packed, by its class", "packed, whatever its shapes", "latent"])
def test_without_the_import_the_package_is_named(users, model):
    assert users.stumbled[model] == ["ValueError", REFUSAL]
    assert not users.stumbled["imported"]


def test_without_the_import_a_pipeline_names_the_package(users):
    error, message = users.stumbled["packed, in a pipeline"]
    assert error == "ValueError" and f"\nValueError: {REFUSAL}\n" in message


def test_a_refusal_is_what_the_page_says(users):
    page = " ".join((TESTS.parent / "docs" / "hub.md").read_text(encoding="utf-8").split())
    assert f"ValueError: {REFUSAL}" in page
    warnings = [message for message in users.stumbled["warnings"] if message.startswith("Unknown quantization type")]
    assert warnings and all(message.startswith("Unknown quantization type, got rebnn - ") for message in warnings)
    assert "Unknown quantization type, got rebnn - " in page


def test_whoever_overrules_the_refusal_meets_the_shapes(users):
    error, message = users.stumbled["overruled"]
    assert error == "RuntimeError" and "ignore_mismatched_sizes" in message


def test_without_the_import_a_tokenizer_loads(users):
    assert users.stumbled["its tokens"] == users.read["tokens"]


@pytest.mark.parametrize("model", ["self-loading", "self-loading, latent"])
def test_without_the_import_a_self_loading_model_names_the_package(users, model):
    error, message = users.stumbled[model]
    assert error == "ValueError"
    assert message == f"{REFUSAL}, or load it with trust_remote_code=True"


def test_where_it_is_not_installed_the_package_is_named(users):
    error, message = users.stumbled["uninstalled"]
    assert error == "ImportError" and "pip install rebnn_hf" in message


@pytest.mark.parametrize(
    ("loaded", "pushed"),
    [
        ("user/self-loading", "user/model"),
        ("user/self-loading, saved again", "user/model"),
        ("user/self-loading, saved again after the import", "user/model"),
        ("latent", "user/latent"),
    ],
)
def test_trusted_code_loads_the_model(users, loaded, pushed):
    assert users.stumbled["logits"][loaded] == users.published["logits"][pushed]


def test_trusted_code_gives_the_whole_model(users):
    assert users.stumbled["fused"] == [True, True] and users.stumbled["same encoder"]
    assert users.stumbled["classified"] == users.published["classified"]
    module, base, native = users.stumbled["classes"]
    assert module.endswith("modeling_rebnn") and base == "BertModel"
    assert native == "transformers.models.bert.modeling_bert", "an import leaves nothing for the code to do"


def test_saving_again_leaves_no_loose_ends(users):
    work = users.folder / "work"
    imported, trusted = (json.loads((work / name / "config.json").read_text()) for name in ("imported", "again"))
    assert "auto_map" not in imported
    assert [*imported["fusion_config"]] == [REFUSAL.removeprefix("Unknown fusion type: ")]
    assert not (work / "imported" / "modeling_rebnn.py").exists()
    assert trusted["auto_map"] == {"AutoModelForSequenceClassification": "modeling_rebnn.BertForSequenceClassification"}
    assert (work / "again" / "modeling_rebnn.py").read_bytes() == (work / "packed" / "modeling_rebnn.py").read_bytes()
    assert imported == {k: v for k, v in trusted.items() if k != "auto_map"}


# Folders that cannot bring code along


def save(model_class, folder, one_bit=True):
    sizes = dict(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    model = model_class(hf.AutoConfig.for_model(model_class.config_class.model_type, **sizes))
    (pack(binarize(model)) if one_bit else model).save_pretrained(folder)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def change_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    ("model_class", "auto_map"),
    [
        (hf.BertModel, {"AutoModel": "BertModel", "AutoModelForTextEncoding": "BertModel"}),
        (
            hf.RobertaForMaskedLM,
            {
                "AutoModelForMaskedLM": "RobertaForMaskedLM",
                "AutoModelForPreTraining": "RobertaForMaskedLM",
                "AutoModel": "RobertaModel",
            },
        ),
    ],
)
def test_auto_map(tmp_path, model_class, auto_map):
    save(model_class, tmp_path)
    allow_loading_without_import(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["auto_map"] == {auto: f"modeling_rebnn.{name}" for auto, name in auto_map.items()}
    before = contents(tmp_path)
    allow_loading_without_import(str(tmp_path))
    assert contents(tmp_path) == before, "twice is as good as once"


def test_notices_of_other_versions_are_ignored_and_fusions_are_not(tmp_path):
    save(hf.BertModel, tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())
    change_config(tmp_path, fusion_config={"patch_embeddings": True, "none: install rebnn_hf": True})
    model = hf.AutoModel.from_pretrained(tmp_path)
    assert model.config.fusion_config == {"patch_embeddings": True, **before["fusion_config"]}
    model.save_pretrained(tmp_path)
    hf.AutoModel.from_pretrained(tmp_path)
    allow_loading_without_import(tmp_path)
    assert hf.AutoModel.from_pretrained(tmp_path).config.fusion_config == model.config.fusion_config
    assert unpack(model).config.fusion_config == {"patch_embeddings": True}


def test_fusions_that_are_none_are_refused(tmp_path):
    save(hf.BertModel, tmp_path)
    change_config(tmp_path, fusion_config=["patch_embeddings"])
    with pytest.raises(ValueError, match=r"fusion_config must be a dict of fusions, got \['patch_embeddings'\]"):
        hf.AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("to_float", [unpack, lambda model: model.dequantize()])
def test_a_float_model_is_free_of_it(tmp_path, to_float):
    save(hf.BertModel, tmp_path / "packed")
    model = hf.AutoModel.from_pretrained(tmp_path / "packed")
    model.save_pretrained(tmp_path / "again")
    to_float(model)
    model.save_pretrained(tmp_path / "float")
    assert "fusion_config" not in json.loads((tmp_path / "float" / "config.json").read_text())


def test_a_folder_from_before_the_notice_loads(tmp_path):
    save(hf.BertModel, tmp_path)
    expected = hf.AutoModel.from_pretrained(tmp_path).state_dict()
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["fusion_config"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    loaded = hf.AutoModel.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    loaded.save_pretrained(tmp_path)
    assert "fusion_config" in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization_config": None}, "is not the folder of a 1-bit model; save one with"),
        ({"quantization_config": {"quant_method": "gptq"}}, "is not the folder of a 1-bit model; save one with"),
        ({"model_type": "timm_wrapper"}, "type timm_wrapper, .*have to `import rebnn_hf`"),
        ({"model_type": "rebnn_faster_rcnn"}, "have to `import rebnn_hf.vision.detection`"),
        ({"auto_map": {"AutoModel": "mine.Model"}}, "code of its own .*mine.Model.*import rebnn_hf in that"),
        ({"architectures": ["MyBert"]}, "no Auto class of transformers loads MyBert"),
        ({"architectures": None}, "no Auto class of transformers loads None"),
    ],
)
def test_other_folders_are_refused_and_left_alone(tmp_path, fields, message):
    save(hf.BertModel, tmp_path)
    change_config(tmp_path, **fields)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message):
        allow_loading_without_import(tmp_path)
    assert contents(tmp_path) == before


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not the folder of a 1-bit model"):
        allow_loading_without_import(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())
