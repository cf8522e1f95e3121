"""The page of `demo.py`: boxes for the text, a column for the float model and one for the 1-bit model.

It asks nothing of the net: no fonts, no scripts, no statistics for Gradio.
"""

from __future__ import annotations

import math
from functools import partial

import gradio as gr
from demo_examples import EXAMPLES
from demo_models import Answer, Comparison, Contest, Contestant, who_computes
from glue_tasks import TASKS

TITLE = "Float and 1-bit, side by side"
THEME = gr.themes.Base(
    primary_hue="indigo", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
)
SERVER = {
    "share": False,
    "ssr_mode": False,  # needs Node
    "mcp_server": False,
    "run_history": False,
    "footer_links": [],
    "theme": THEME,
    "quiet": True,
}
BOX_NAMES = {"sentence1": "First sentence", "sentence2": "Second sentence"}
UNKNOWN_BOXES = ("Sentence", "Second sentence, if the model reads pairs")


def build_page(contest: Contest, task: str | None = None) -> gr.Blocks:
    """The page; `launch(**SERVER)` shows it.

    Args:
        contest: the models.
        task: of `glue_tasks`, gives the boxes and the examples; None: two boxes and no examples.
    """
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(f"# {TITLE}\n\n{introduction(contest, task)}")
        boxes = [gr.Textbox(label=name, lines=2, max_lines=6) for name in box_names(task)]
        button = gr.Button("Compare", variant="primary")
        if task in EXAMPLES:
            gr.Examples([list(texts) for texts in EXAMPLES[task]], boxes, label="Examples")
        with gr.Row(equal_height=True):
            columns = [
                column("Float teacher", "float", contest.teacher),
                column("1-bit", "one-bit", contest.packed),
            ]
        verdict = gr.Markdown(elem_id="verdict")
        gr.Markdown(who_computes(contest.packed.model), elem_id="computes")
        shown = [component for pair in columns for component in pair] + [verdict]
        for event in (button.click, *(box.submit for box in boxes)):
            event(partial(show, contest), boxes, shown, api_name=False)
    return page


def introduction(contest: Contest, task: str | None) -> str:
    """What the visitor sees here."""
    kind = type(contest.packed.model).__name__
    about = f"{kind}, fine-tuned on {task}" if task else kind
    return (
        f"{about}: the float model, and the 1-bit model that learned from it. Type a text and see what each predicts, "
        "how long it takes and how large its file is."
    )


def box_names(task: str | None) -> tuple[str, ...]:
    """Names of the boxes for the texts of a task."""
    if task not in TASKS:
        return UNKNOWN_BOXES
    sentences = TASKS[task].sentences
    if len(sentences) == 1:
        return ("Sentence",)
    return tuple(BOX_NAMES.get(name, name.rstrip("12").capitalize()) for name in sentences)


def column(title: str, name: str, model: Contestant) -> tuple[gr.Label, gr.Markdown]:
    """The column of a model: its prediction, how long it took, its size."""
    with gr.Column(elem_id=name, min_width=280):
        gr.Markdown(f"## {title}")
        label = gr.Label(label="Prediction")
        time = gr.Markdown("time: press Compare")
        gr.Markdown(f"file: **{megabytes(model.bytes)}**")
    return label, time


def show(contest: Contest, *texts: str) -> tuple[object, ...]:
    """What the page shows for these texts."""
    try:
        comparison = contest.answer(*texts)
    except ValueError as error:
        raise gr.Error(str(error), title="Nothing to compare", print_exception=False) from None
    return *answered(comparison.teacher), *answered(comparison.packed), verdict(contest, comparison)


def answered(answer: Answer) -> tuple[dict[str, float] | str, str]:
    """Prediction and time of one model; probabilities if it has several outputs, else the number."""
    scores = answer.scores
    prediction = scores if len(scores) > 1 else f"{next(iter(scores.values())):.2f}"
    return prediction, f"time: **{digits(answer.milliseconds)} ms**"


def verdict(contest: Contest, comparison: Comparison) -> str:
    """The comparison in a sentence."""
    faster = comparison.faster
    speed = f"{digits(faster)} times as fast" if faster >= 1 else f"{digits(1 / faster)} times as slow"
    return f"The 1-bit model is **{speed}**, its file **{digits(contest.smaller)} times smaller**."


def megabytes(size: int) -> str:
    """Bytes in MB."""
    return f"{digits(size / 1e6)} MB"


def digits(value: float) -> str:
    """Three digits, as many behind the point as that takes."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"
