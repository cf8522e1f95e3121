"""Sentences to begin with on the page of `demo.py`, by task of `glue_tasks`; pairs where the task reads pairs."""

from __future__ import annotations

EXAMPLES: dict[str, list[tuple[str, ...]]] = {
    "demo": [
        ("the film was far from dull",),
        ("although the cast was graceful , the critics hated the ending",),
        ("the readers who mocked the plot admired the poem",),
        ("the concert was less moving than noisy",),
    ],
    "cola": [
        ("The cat that we saw yesterday sleeps on the sofa.",),
        ("The cat that we saw it yesterday sleeps on the sofa.",),
        ("Which book did she say that he had forgotten to return?",),
    ],
    "sst2": [
        ("A warm, funny film that never outstays its welcome.",),
        ("Two hours of noise without a single idea.",),
        ("It is not nearly as bad as the trailer made me fear.",),
    ],
    "mrpc": [
        ("The company said profits rose by ten percent.", "Profits went up ten percent, the company reported."),
        ("The company said profits rose by ten percent.", "The company said its sales fell by ten percent."),
    ],
    "stsb": [
        ("A man is playing a guitar.", "Someone plays an instrument."),
        ("A man is playing a guitar.", "A woman is slicing an onion."),
    ],
    "qqp": [
        ("How do I learn to swim?", "What is the best way to learn swimming?"),
        ("How do I learn to swim?", "How long does it take to learn to dive?"),
    ],
    "mnli": [
        ("Three children are running along the beach.", "Some children are outdoors."),
        ("Three children are running along the beach.", "The children are looking for their dog."),
        ("Three children are running along the beach.", "The beach is empty."),
    ],
    "qnli": [
        ("When was the bridge built?", "Work on the bridge was finished in 1894."),
        ("When was the bridge built?", "The bridge is crossed by many thousands of people every day."),
    ],
    "rte": [
        ("The bridge was finished in 1894, after eight years of work.", "The bridge was built in the 19th century."),
        ("The bridge was finished in 1894, after eight years of work.", "The bridge fell down after eight years."),
    ],
    "wnli": [
        ("The piano did not pass through the door because it was too wide.", "The piano was too wide."),
        ("The piano did not pass through the door because it was too wide.", "The door was too wide."),
    ],
}
