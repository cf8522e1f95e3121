"""Sentence embedders with random weights that the tests of sentence-transformers share, and sentences they can read."""

from pathlib import Path

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from transformers import BertConfig, BertModel, BertTokenizer, PreTrainedModel, set_seed

WHO = ("man", "woman", "small child", "very old dog")
DOING = ("playing with", "looking for", "cutting", "painting")
WHAT = ("red ball", "guitar in the park", "piece of wood", "big house near the sea")
SENTENCES = [f"a {who} is {doing} a {what}." for who in WHO for doing in DOING for what in WHAT]
"""64 sentences of 8 to 14 tokens."""

SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
WIDE = {"initializer_range": 0.14}
"""Random weights large enough that each layer changes what it reads."""


def tokenizer(token_types: bool = True) -> BertTokenizer:
    """Knows the words of `SENTENCES`."""
    words = sorted({word for sentence in SENTENCES for word in sentence.replace(".", " .").split()})
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    tokenizer = BertTokenizer(vocab={token: number for number, token in enumerate(tokens)}, model_max_length=32)
    if not token_types:
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


def embedder(folder: Path, model: PreTrainedModel | None = None, token_types: bool = True) -> SentenceTransformer:
    """Transformer, mean of the tokens, a dense layer and vectors of length 1; its transformer goes through `folder`."""
    set_seed(0)
    if model is None:
        model = BertModel(BertConfig(vocab_size=len(tokenizer()), max_position_embeddings=40, **SHAPE, **WIDE))
    model.save_pretrained(folder)
    tokenizer(token_types).save_pretrained(folder)
    dense = Dense(in_features=model.config.hidden_size, out_features=24)
    modules = [Transformer(str(folder)), Pooling(model.config.hidden_size), dense, Normalize()]
    prompts = {"query": "a dog is looking for a ", "document": ""}
    return SentenceTransformer(modules=modules, prompts=prompts, device="cpu").eval()
