"""The Trainer of `embedder.py`."""

from __future__ import annotations

from typing import Any

from recipe_training import DistillationTrainer
from torch import Tensor, nn

from rebnn_hf.distillation import hidden_relative_mse


class EmbedderTrainer(DistillationTrainer):
    """Distils the states of tokens, as every `ReBNNTrainer` does, and the embeddings of sentences made of them.

    L = L_hidden + embedding_weight * sum_n ||s_n - t_n||^2 / sum_n ||t_n||^2,   over the sentences of a batch

    where L_hidden (and what else the arguments ask for) compares student and teacher layer by layer, and s and t are
    the two embeddings of a sentence. The second part sees what errors of tokens add up to; for embeddings of length 1
    it is 2 - 2 cos(s, t).

    Args:
        pooling: Turns token states into embeddings; the same for student and teacher, and not trained.
        embedding_weight: Of the second part.
        **kwargs: As for `ReBNNTrainer`.
    """

    def __init__(self, *args: Any, pooling: nn.Module, embedding_weight: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.pooling = pooling.to(self.args.device)
        self.embedding_weight = embedding_weight
        self._teacher_states: Tensor | None = None
        self.teacher.register_forward_hook(self._keep_states)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, Any]:
        """Loss of the batch."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        student, teacher = (
            self.pooling({"token_embeddings": states, "attention_mask": inputs["attention_mask"]})["sentence_embedding"]
            for states in (outputs.last_hidden_state, self._teacher_states)
        )
        loss = loss + self.embedding_weight * hidden_relative_mse(student[None], teacher[None])
        return (loss, outputs) if return_outputs else loss

    def _keep_states(self, _module: nn.Module, _inputs: Any, outputs: Any) -> None:
        """What the teacher made of the batch, which `ReBNNTrainer` asks it for anyway."""
        self._teacher_states = outputs.last_hidden_state
