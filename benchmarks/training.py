"""Step time of ReBNN distillation against plain Hugging Face fine-tuning of the same shape, in one table.

All models have random weights and see the same random tokens, without padding. The fine-tuning step is that of
`transformers.Trainer` at its defaults: forward with labels and dropout, backward, gradient clipping, fused AdamW. The
ReBNN step is that of `ReBNNTrainer` at its defaults: student forward with dropout, teacher forward, loss on logits
and hidden states, backward, gradient clipping, fused AdamW between the two hooks of the balance rule. The recipe step
is the same as `recipes/glue.py` sets it up: no dropout in the student, float embeddings frozen, attention written out.
`--preset` takes the student's bits and its losses from a named method, for example 1-bit activations and attention.

The steps alternate, so that a busy machine slows all; the ratio printed is that of the medians, with the quartiles
of the ratios of neighbouring steps beside it. Parts are explicit timers around the calls and hooks, not a profiler:
they add up to the step; `--profile` shows the operations behind them.

    python benchmarks/training.py --threads 1 --steps 10
    python benchmarks/training.py --threads 1 --steps 10 --preset rebnn-bit-w1a1
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import AutoModelForSequenceClassification, BertConfig, Trainer, TrainingArguments

import rebnn_hf
from rebnn_hf import ReBNNConfig, ReBNNTrainer, ReBNNTrainingArguments
from rebnn_hf.presets import CONFIGS

PARTS = ("student forward", "teacher forward", "loss", "backward", "clipping", "hook before", "AdamW", "hook after")
METHODS = ("fine-tuning", "ReBNN", "recipe")
REBNN_ONLY = ("teacher forward", "hook before", "hook after")
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PRESET = "rebnn-w1a32"


@dataclass(frozen=True)
class Shape:
    """A BERT encoder and a batch of tokens for it."""

    layers: int
    hidden: int
    heads: int
    intermediate: int
    batch: int
    tokens: int
    vocabulary: int = 30522

    def config(self) -> BertConfig:
        """Configuration with the dropout that BERT is fine-tuned with (0.1)."""
        return BertConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.intermediate,
            num_labels=2,
        )

    def inputs(self) -> dict[str, torch.Tensor]:
        """Random tokens and labels."""
        ids = torch.randint(self.vocabulary, (self.batch, self.tokens))
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.randint(2, (self.batch,)),
        }


SHAPES = {
    "bert-base": Shape(layers=12, hidden=768, heads=12, intermediate=3072, batch=8, tokens=64),
    "minilm": Shape(layers=6, hidden=384, heads=12, intermediate=1536, batch=16, tokens=64),
    "tiny": Shape(layers=2, hidden=64, heads=2, intermediate=128, batch=4, tokens=16, vocabulary=500),
}


@dataclass
class Timer:
    """Time spent in the named parts of a step: each mark closes the part that began at the mark before."""

    clock: Callable[[], float]
    spent: dict[str, float] = field(default_factory=dict)
    last: float = 0.0

    def start(self) -> None:
        """Begin a step."""
        self.spent, self.last = dict.fromkeys(PARTS, 0.0), self.clock()

    def mark(self, part: str) -> None:
        """What passed since the last mark was spent in this part."""
        now = self.clock()
        self.spent[part] += now - self.last
        self.last = now

    def hook(self, part: str) -> Callable[..., None]:
        """The mark as a hook of a module or an optimizer."""

        def mark(*_) -> None:
            self.mark(part)

        return mark


@dataclass
class Contender:
    """A trainer whose steps are timed in parts."""

    trainer: Trainer
    timer: Timer

    def step(self, inputs: dict[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, float]:
        """One optimizer step; seconds of each part."""
        trainer, timer = self.trainer, self.timer
        timer.start()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = trainer.compute_loss(trainer.model, inputs)
        timer.mark("loss")
        loss.backward()
        timer.mark("backward")
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
        timer.mark("clipping")
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        timer.mark("AdamW")
        return dict(timer.spent)


def fine_tuning(shape: Shape, folder: str, clock: Callable[[], float]) -> Contender:
    """Plain fine-tuning with `transformers.Trainer`."""
    model = AutoModelForSequenceClassification.from_config(shape.config()).train()
    trainer = Trainer(model, TrainingArguments(folder, use_cpu=True, report_to="none"))
    timer = Timer(clock)
    model.register_forward_hook(timer.hook("student forward"))
    trainer.create_optimizer()
    return Contender(trainer, timer)


def distillation(
    shape: Shape, folder: str, clock: Callable[[], float], as_in_recipe: bool, preset: str = PRESET
) -> Contender:
    """Distillation of a preset's 1-bit student with `ReBNNTrainer`, with its defaults or those of the recipe."""
    config = shape.config()
    if as_in_recipe:
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
        config._attn_implementation = "eager"
    teacher = AutoModelForSequenceClassification.from_config(config)
    model = AutoModelForSequenceClassification.from_config(copy.deepcopy(config))  # 1-bit attention changes it
    rebnn_hf.binarize(model, ReBNNConfig.preset(preset)).train()
    rebnn_hf.calibrate(model, shape.inputs())
    for module in model.modules():
        if type(module) is torch.nn.Embedding:
            module.weight.requires_grad_(not as_in_recipe)
    args = ReBNNTrainingArguments.preset(preset, output_dir=folder, use_cpu=True, report_to="none")
    trainer = ReBNNTrainer(model=model, args=args, teacher=teacher)
    timer = Timer(clock)
    model.register_forward_hook(timer.hook("student forward"))
    trainer.teacher.register_forward_hook(timer.hook("teacher forward"))
    optimizer = trainer.create_optimizer()
    # Hooks run in the order they were registered: those of the rule go between timers.
    trainer.resilience.detach()
    optimizer.register_step_post_hook(timer.hook("AdamW"))
    trainer.resilience = rebnn_hf.attach(optimizer, model, trainer.resilience.rule)
    optimizer.register_step_pre_hook(timer.hook("hook before"))
    optimizer.register_step_post_hook(timer.hook("hook after"))
    return Contender(trainer, timer)


def measure(
    shape: Shape, steps: int, warmup: int, clock: Callable[[], float], preset: str = PRESET, profiled: bool = False
) -> dict[tuple[str, str], list[dict]]:
    """Alternate the steps of all contenders in all precisions; seconds by part, after the warm-up."""
    times: dict[tuple[str, str], list[dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        contenders = {
            "fine-tuning": fine_tuning(shape, folder, clock),
            "ReBNN": distillation(shape, folder, clock, as_in_recipe=False, preset=preset),
            "recipe": distillation(shape, folder, clock, as_in_recipe=True, preset=preset),
        }
        for step in range(-warmup, steps):
            inputs = shape.inputs()
            for precision, dtype in PRECISIONS.items():
                for name, contender in contenders.items():
                    spent = contender.step(inputs, dtype)
                    if step >= 0:
                        times.setdefault((precision, name), []).append(spent)
        if profiled:
            print_profile(contenders["recipe"], shape.inputs())
    return times


def print_profile(contender: Contender, inputs: dict[str, torch.Tensor]) -> None:
    """Operations of one fp32 step that take most time of their own, by torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        contender.step(inputs, None)
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=45))


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    return tuple(statistics.quantiles(values, n=4, method="inclusive")) if len(values) > 1 else (values[0],) * 3


def rows(shape_name: str, times: dict[tuple[str, str], list[dict]]) -> list[dict]:
    """Rows of the table: the steps with their parts; times in milliseconds."""
    table = []
    for precision in PRECISIONS:
        totals = {name: [sum(step.values()) for step in times[precision, name]] for name in METHODS}
        for name, seconds in totals.items():
            base = {"shape": shape_name, "precision": precision, "method": name}
            step = row(base, "step", seconds)
            step["ratio"] = step["median"] / (quartiles(totals["fine-tuning"])[1] * 1e3)
            pairs = zip(seconds, totals["fine-tuning"], strict=True)
            step["ratio_q1"], _, step["ratio_q3"] = quartiles([mine / theirs for mine, theirs in pairs])
            table.append(step)
            for part in PARTS:
                spent = [step[part] for step in times[precision, name]]
                if name != "fine-tuning" or part not in REBNN_ONLY:
                    table.append(row(base, part, spent) | {"share": sum(spent) / sum(seconds)})
    return table


def row(base: dict, part: str, seconds: list[float]) -> dict:
    """Median and spread in milliseconds."""
    low, middle, high = quartiles([s * 1e3 for s in seconds])
    return base | {"part": part, "median": middle, "min": min(seconds) * 1e3, "q1": low, "q3": high}


def print_table(table: list[dict]) -> None:
    """The rows as text."""
    print(f"{'shape':10}{'precision':10}{'method':12}{'part':17}{'median ms':>10}{'min':>9}{'quartiles':>18}  share")
    for r in table:
        spread = f"{r['q1']:.1f}-{r['q3']:.1f}"
        last = f"{r['share']:5.1%}" if "share" in r else f"x {r['ratio']:.2f} ({r['ratio_q1']:.2f}-{r['ratio_q3']:.2f})"
        times = f"{r['median']:10.1f}{r['min']:9.1f}{spread:>18}"
        print(f"{r['shape']:10}{r['precision']:10}{r['method']:12}{r['part']:17}{times}  {last}")


def main(arguments: list[str] | None = None) -> list[dict]:
    """Measure the chosen shapes, print the table, return its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["bert-base", "minilm"])
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each kind (default 10)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before timing begins (default 2)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time, for a shared machine")
    parser.add_argument("--preset", choices=CONFIGS, default=PRESET, help=f"method of the students (default {PRESET})")
    parser.add_argument("--profile", action="store_true", help="also show the operations of one step of the recipe")
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.warmup < 0 or options.threads < 1:
        parser.error("--steps and --threads must be at least 1, --warmup at least 0")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(
        f"torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()}), {options.threads} thread(s), "
        f"{options.steps} steps, {options.clock} time, {options.preset}"
    )
    table = []
    for name in options.shape:
        times = measure(
            SHAPES[name], options.steps, options.warmup, CLOCKS[options.clock], options.preset, options.profile
        )
        table += rows(name, times)
    print_table(table)
    return table


if __name__ == "__main__":
    main()
