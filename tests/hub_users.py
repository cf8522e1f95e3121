"""What users of the Hub do, a process each: `python hub_users.py ROLE FOLDER` prints what came of it as JSON.

The role `publish` runs the code of docs/hub.md. Nothing here imports rebnn_hf before the role that wants it: one is
played by someone who does not know it.
"""

from __future__ import annotations

import importlib.abc
import json
import logging
import os
import sys
from pathlib import Path

import torch
import transformers
from huggingface_hub import HfApi, get_session
from pages import python_blocks
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline

IDS = torch.tensor([[2, 5, 6, 7, 3], [2, 8, 9, 4, 3]])
SENTENCE = "a fine film"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "fine", "film", "an", "awful", "one"]
load = AutoModelForSequenceClassification.from_pretrained


def answers(model) -> list:
    """Logits of fixed token ids, exactly."""
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.tolist()


def refusal(action, *args, **kwargs) -> list[str]:
    """Type and message of the error that a call ends in."""
    try:
        result = action(*args, **kwargs)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return [type(error).__name__, str(error)]
    return ["nothing", f"it returned {type(result).__name__}"]


def build(seed: int, width: int = 20):
    """A small float model, far from its initial values."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=len(WORDS), hidden_size=width, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.BertConfig(**sizes, intermediate_size=36, max_position_embeddings=16)
    model = transformers.BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def build_tokenizer():
    """A word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def publish(folder: Path) -> dict:
    """Push models of all kinds; what they answer before, and what is refused."""
    import rebnn_hf

    tokenizer, teacher = build_tokenizer(), build(1)
    method = rebnn_hf.ReBNNConfig.preset("rebnn-bit-w1a1", word_embeddings=True)
    student = rebnn_hf.binarize(build(2, width=32), method)  # wide enough for the engine's fused encoder
    rebnn_hf.calibrate(student, {"input_ids": IDS})
    os.chdir(folder)
    teacher.push_to_hub("user/teacher")
    names = {"student": student, "tokenizer": tokenizer}
    for block in python_blocks("hub.md"):
        exec(compile(block, "hub.md", "exec"), names)
    logits = {"user/model": answers(student), "docs": answers(names["model"])}
    classified = names["classify"](SENTENCE)

    other = rebnn_hf.pack(rebnn_hf.binarize(build(3)))
    other.push_to_hub("user/model", revision="v2")
    other.push_to_hub("user/sharded", max_shard_size="2KB")
    other.save_pretrained("collection/students/small")
    HfApi().create_repo("user/collection")
    HfApi().upload_folder(repo_id="user/collection", folder_path="collection")
    logits["other"] = answers(other)

    latent = rebnn_hf.binarize(build(4))
    latent.push_to_hub("user/latent", private=True)
    latent.save_pretrained("plain-latent")
    latent.save_pretrained("latent")
    rebnn_hf.allow_loading_without_import("latent")
    logits["user/latent"] = answers(latent)

    logits["user/trained"] = train(folder, tokenizer)
    return {
        "logits": logits,
        "classified": classified,
        "parameters": rebnn_hf.summary(student).totals["parameters"],
        "counted by the Hub": sum(HfApi().get_safetensors_metadata("user/model").parameter_count.values()),
        "read-only token": refusal(other.push_to_hub, "user/model", token="user-reads"),
        "somebody else": refusal(other.push_to_hub, "user/model", token="other-writes"),
        "no token": refusal(other.push_to_hub, "user/new", token=False),
    }


def train(folder: Path, tokenizer) -> list:
    """Two steps with a teacher from the Hub, pack, and push by the Trainer."""
    import rebnn_hf

    rows = [{"input_ids": row, "labels": index % 2} for index, row in enumerate(IDS.tolist() * 4)]
    trainer = rebnn_hf.ReBNNTrainer(
        model=rebnn_hf.binarize(build(5)),
        teacher="user/teacher",
        args=rebnn_hf.ReBNNTrainingArguments(
            output_dir=folder / "training",
            max_steps=2,
            per_device_train_batch_size=4,
            hub_model_id="user/trained",
            report_to="none",
            use_cpu=True,
            plot_oscillation=False,
            disable_tqdm=True,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()
    rebnn_hf.pack(trainer.model)
    trainer.push_to_hub(license="mit", language="en")
    return answers(trainer.model)


def read(folder: Path) -> dict:
    """Load all that was published, without a token in the environment."""
    import rebnn_hf
    from rebnn_hf.layers import LATENT_TYPES, PACKED_TYPES

    first = HfApi().resolve_revision("user/model").resolved
    latent = load("user/latent", token="user-reads")
    model = load("user/model")
    get_session().get(f"{os.environ['HF_ENDPOINT']}/local-files-only")  # a mark in what the server has seen
    cached = answers(load("user/model", local_files_only=True))
    get_session().get(f"{os.environ['HF_ENDPOINT']}/may-ask-again")
    return {
        "logits": {
            "user/model": answers(model),
            "user/model, local files": cached,
            "user/model, branch v2": answers(load("user/model", revision="v2")),
            "user/model, commit": answers(load("user/model", revision=first)),
            "user/sharded": answers(load("user/sharded")),
            "user/collection": answers(load("user/collection", subfolder="students/small")),
            "user/latent": answers(latent),
            "user/trained": answers(load("user/trained")),
            "user/self-loading": answers(load("user/self-loading")),
        },
        "packed": sum(isinstance(module, PACKED_TYPES) for module in model.modules()),
        "latent": sum(isinstance(module, LATENT_TYPES) for module in latent.modules()),
        "fused": rebnn_hf.is_fused(model),
        "tokens": AutoTokenizer.from_pretrained("user/model")(SENTENCE)["input_ids"],
        "classified": pipeline("text-classification", model="user/model")(SENTENCE),
        "not in the cache": refusal(load, "user/teacher", local_files_only=True),
        "private": refusal(load, "user/latent"),
        "private, by somebody else": refusal(load, "user/latent", token="other-writes"),
        "no such revision": refusal(load, "user/model", revision="v3"),
        "no such model": refusal(load, "user/nothing"),
        "no such subfolder": refusal(load, "user/collection", subfolder="students/large"),
    }


def read_offline(folder: Path) -> dict:
    """Load what `read` left in the cache, while nothing can be reached."""
    import rebnn_hf  # noqa: F401

    return {
        "logits": {
            "user/model": answers(load("user/model")),
            "user/model, branch v2": answers(load("user/model", revision="v2")),
            "user/sharded": answers(load("user/sharded")),
            "user/collection": answers(load("user/collection", subfolder="students/small")),
            "user/latent": answers(load("user/latent")),
        },
        "classified": pipeline("text-classification", model="user/model")(SENTENCE),
        "not in the cache": refusal(load, "user/teacher"),
    }


class Uninstalled(importlib.abc.MetaPathFinder):
    """Makes a machine without the package of this one."""

    def find_spec(self, name, path, target=None):
        """No package of that name."""
        if name.partition(".")[0] == "rebnn_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def stumble(folder: Path) -> dict:
    """Load without importing rebnn_hf: as it is, told to trust, and where it is not even installed."""
    warnings = Warnings()
    logging.getLogger("transformers").addHandler(warnings)
    trusting = {"trust_remote_code": True}
    told = {
        "packed": refusal(load, "user/sharded"),
        "packed, by its class": refusal(transformers.BertForSequenceClassification.from_pretrained, "user/sharded"),
        "packed, whatever its shapes": refusal(load, "user/sharded", ignore_mismatched_sizes=True),
        "packed, in a pipeline": refusal(pipeline, "text-classification", model="user/sharded"),
        "latent": refusal(load, folder / "plain-latent"),
        "its tokens": AutoTokenizer.from_pretrained("user/model")(SENTENCE)["input_ids"],
        "overruled": refusal(load, "user/sharded", fusion_config={}),
        "self-loading": refusal(load, "user/self-loading"),
        "self-loading, latent": refusal(load, folder / "latent"),
        "imported": "rebnn_hf" in sys.modules,
        "warnings": list(warnings.messages),
    }
    sys.meta_path.insert(0, Uninstalled())
    told["uninstalled"] = refusal(load, "user/self-loading", **trusting)
    del sys.meta_path[0]

    model = load("user/self-loading", **trusting)
    base = AutoModel.from_pretrained("user/self-loading", **trusting)
    latent = load(folder / "latent", **trusting)
    model.save_pretrained(folder / "again")
    import rebnn_hf

    load("user/self-loading").save_pretrained(folder / "imported")
    return told | {
        "logits": {
            "user/self-loading": answers(model),
            "user/self-loading, saved again": answers(load(folder / "again", **trusting)),
            "user/self-loading, saved again after the import": answers(load(folder / "imported")),
            "latent": answers(latent),
        },
        "fused": [rebnn_hf.is_fused(model), rebnn_hf.is_fused(base)],
        "classes": [type(model).__module__, type(base).__name__, type(load("user/self-loading")).__module__],
        "same encoder": torch.equal(base(IDS).last_hidden_state, model.base_model(IDS).last_hidden_state),
        "classified": pipeline("text-classification", model="user/self-loading", **trusting)(SENTENCE),
    }


class Warnings(logging.Handler):
    """Keeps what transformers warned of."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        """Keep a message."""
        self.messages.append(record.getMessage())


if __name__ == "__main__":
    role = {"publish": publish, "read": read, "read_offline": read_offline, "stumble": stumble}[sys.argv[1]]
    print(json.dumps(role(Path(sys.argv[2]))))
