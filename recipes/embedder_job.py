"""A run of `embedder.py`: its sentences, its embedders, and what their embeddings are worth."""

from __future__ import annotations

from functools import cached_property, partial
from pathlib import Path

import sentence_transformers
from datasets import DatasetDict
from embedder_arguments import EmbedderArguments
from embedder_data import EmbedderTask, load_data
from recipe_job import Logits, TextJob, first, load_pretrained, tokenize
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.modules import Transformer
from torch import nn
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from rebnn_hf.timing import Contender, interleave, quartiles

PAIR = ("sentence1", "sentence2")
BATCH = 32  # sentences embedded together
COMPARED = 256  # pairs that show whether two models are the same
TIMED = 128  # sentences that the speed is measured on
ROUNDS = 3


class EmbedderJob(TextJob):
    """Sentences whose embeddings follow those of a float embedder.

    What is trained is the transformer alone; an embedder is that with the modules behind it, which stay the teacher's.
    Validated and scored are whole embedders, as their users have them.
    """

    script = "recipes/embedder.py"
    auto_model = AutoModel
    pipeline_tag = "sentence-similarity"
    library_name = "sentence-transformers"
    libraries = (sentence_transformers,)
    usage = """\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder")
embeddings = model.encode(["A man is playing a flute.", "Someone plays an instrument."])
print(model.similarity(embeddings, embeddings))"""

    arguments: EmbedderArguments
    task: EmbedderTask

    @staticmethod
    def load_data(arguments: EmbedderArguments) -> tuple[EmbedderTask, DatasetDict]:
        """The sentences to learn from, and the pairs to be judged by."""
        options = arguments.data
        try:
            data = load_data(options.tasks, options.data_dir, options.train_file)
        except (ValueError, OSError) as error:
            raise SystemExit(f"{error}") from None
        limits = {"train": options.max_train_samples, "validation": options.max_eval_samples}
        return EmbedderTask(), DatasetDict({name: first(split, limits[name]) for name, split in data.items()})

    @staticmethod
    def load_tokenizer(arguments: EmbedderArguments, data: DatasetDict) -> PreTrainedTokenizerBase:
        """The tokenizer of the teacher, which knows how many tokens it reads.

        Raises:
            SystemExit: If there is no teacher, or it does not begin with a transformer.
        """
        source = arguments.teacher.source
        embedder = load_pretrained(SentenceTransformer, source)
        if not isinstance(embedder[0], Transformer):
            raise SystemExit(
                f"--teacher {source} begins with a {type(embedder[0]).__name__}: pass an embedder that begins with a "
                "transformer, which is what becomes 1-bit."
            )
        return embedder.tokenizer

    @cached_property
    def tokens(self) -> DatasetDict:
        """The training sentences as token ids."""
        return self.tokenized(DatasetDict(train=self.data["train"]))

    def tokenized(self, data: DatasetDict) -> DatasetDict:
        """Sentences as token ids; made once, by the main process, and read from the cache by the others."""
        columns = list(self.task.sentence_columns)
        length = min(self.arguments.data.max_length, self.tokenizer.model_max_length)
        options = {"tokenizer": self.tokenizer, "columns": columns, "max_length": length}
        with self.process.main_process_first():
            return data.map(tokenize, batched=True, fn_kwargs=options, remove_columns=columns)

    # The embedders

    def load_embedder(self, folder: Path) -> SentenceTransformer:
        """A whole embedder as its users load it."""
        return SentenceTransformer(str(folder), device=str(self.process.device))

    def embedder(self, transformer: PreTrainedModel) -> SentenceTransformer:
        """The teacher with another transformer in it."""
        embedder = self.load_embedder(self.teacher_folder)
        embedder[0].model = transformer
        return embedder

    def pooling(self) -> nn.Sequential:
        """What turns the states of tokens into the embedding of a sentence: the modules behind the transformer."""
        return nn.Sequential(*list(self.load_embedder(self.teacher_folder))[1:]).requires_grad_(False).eval()

    def validate(self, model: SentenceTransformer) -> Logits:
        """The embeddings of both sentences of the first validation pairs."""
        pairs = first(self.data["validation"], COMPARED)
        return {column: model.encode(list(pairs[column]), batch_size=BATCH) for column in PAIR}

    def score(self, model: SentenceTransformer) -> dict[str, float]:
        """How the cosines of embeddings go with the similarities that people gave: sentence-transformers' evaluator."""
        columns = (list(self.data["validation"][column]) for column in (*PAIR, "label"))
        options = {"batch_size": BATCH, "main_similarity": "cosine", "write_csv": False}
        scores = EmbeddingSimilarityEvaluator(*columns, **options)(model)
        return {name: float(scores[name]) for name in self.task.metrics}

    def speed(self, models: dict[str, SentenceTransformer]) -> dict[str, float]:
        """Sentences per second of each model, side by side in one run."""
        sentences = list(self.data["validation"]["sentence1"])[:TIMED]
        contenders = [
            Contender(name, partial(model.encode, sentences, batch_size=BATCH)) for name, model in models.items()
        ]
        times = interleave(contenders, ROUNDS)
        return {name: len(sentences) / quartiles(seconds)[1] for name, seconds in times.items()}

    # What the model card says

    @property
    def title(self) -> str:
        """The embedder."""
        return f"{self.origin} with 1-bit weights"

    @property
    def model_name(self) -> str:
        """The same in short."""
        return f"{Path(self.origin).name}-1bit"
