"""A packed model in a server: many threads, many loads; the answers stay the same and memory does not grow.

The tests take seconds. The full minute and 1,000 cycles, with the numbers: `python tests/test_serving.py`.
"""

import gc
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
import transformers as hf

from rebnn_hf import ReBNNConfig, binarize, calibrate, is_fused, pack

SIZES = dict(vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96)
METHODS = ("rebnn-w1a32", "rebnn-bit-w1a1")
THREADS = 8


def make(method):
    torch.manual_seed(0)
    model = hf.BertForSequenceClassification(hf.BertConfig(**SIZES, max_position_embeddings=64)).eval()
    binarize(model, ReBNNConfig.preset(method, word_embeddings=True))
    calibrate(model, {"input_ids": torch.arange(64).reshape(2, 32)})
    return pack(model)


def batches():
    """Of different sizes and paddings."""
    made = []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        count, length = 1 + seed % 4, 1 + 5 * seed
        ids = torch.randint(100, (count, length), generator=generator)
        ends = torch.randint(1, length + 1, (count, 1), generator=generator)
        made.append({"input_ids": ids, "attention_mask": (torch.arange(length) < ends).long()})
    return made


@torch.inference_mode()
def logits(model, batch):
    return model(**batch).logits


def memory():
    """Resident bytes of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def serve(model, seconds, threads=THREADS):
    """Let threads call a model, each with all batches in an order of its own.

    Returns:
        Calls made, answers that differ from the single-threaded ones, and how memory grew after a tenth of the time.
    """
    questions = batches()
    answers = [logits(model, batch) for batch in questions]
    counts, wrong, errors = [0] * threads, [], []
    end = time.monotonic() + seconds

    def call(number):
        try:
            while time.monotonic() < end:
                which = (counts[number] * (2 * number + 1) + number) % len(questions)
                if not torch.equal(logits(model, questions[which]), answers[which]):
                    wrong.append((number, which))
                counts[number] += 1
        except Exception as error:  # noqa: BLE001 - told by the thread that joins
            errors.append(error)

    workers = [threading.Thread(target=call, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    time.sleep(seconds / 10)
    warm = memory()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    return sum(counts), wrong, memory() - warm


def reload(folder, cycles, warm=10):
    """Load, ask and forget a model; how memory grew after the first few times."""
    (question,) = batches()[3:4]
    for cycle in range(cycles):
        model = hf.AutoModelForSequenceClassification.from_pretrained(folder)
        answer = logits(model, question)
        del model
        if cycle % 10 == 9:
            gc.collect()
        if cycle == warm:
            first, before = answer, memory()
        if cycle > warm and not torch.equal(answer, first):
            raise AssertionError(f"cycle {cycle} gives another answer")
    gc.collect()
    return memory() - before


linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


@linux
@pytest.mark.parametrize("method", METHODS)
def test_threads_get_the_answers_of_one(method):
    model = make(method)
    assert is_fused(model) == (method == "rebnn-bit-w1a1")
    calls, wrong, grown = serve(model, seconds=2)
    assert calls > THREADS and wrong == []
    assert grown < 20e6


@linux
def test_the_first_calls_may_come_from_all_threads_at_once():
    """Layouts and the image of the encoder are made in the first call: here by eight threads at once."""
    question = batches()[5]
    for method in METHODS:
        expected = logits(make(method), question)
        for _ in range(5):
            model, start, answers = make(method), threading.Barrier(THREADS), []

            def call(model=model, start=start, answers=answers):
                start.wait()
                answers.append(logits(model, question))

            workers = [threading.Thread(target=call) for _ in range(THREADS)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            assert len(answers) == THREADS and all(torch.equal(answer, expected) for answer in answers)


@linux
@pytest.mark.parametrize("method", METHODS)
def test_loading_again_and_again_does_not_leak(method, tmp_path):
    make(method).save_pretrained(tmp_path)
    assert reload(tmp_path, cycles=60) < 8e6


def main():
    """The minute and the thousand cycles."""
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    seconds, cycles = (float(sys.argv[1]), int(sys.argv[2])) if len(sys.argv) > 2 else (60, 1000)
    for method in METHODS:
        calls, wrong, grown = serve(make(method), seconds)
        print(
            f"{method}: {calls} calls from {THREADS} threads in {seconds:.0f} s, {len(wrong)} other answers, "
            f"memory {grown / 1e6:+.1f} MB"
        )
        with tempfile.TemporaryDirectory() as folder:
            make(method).save_pretrained(Path(folder))
            print(f"{method}: {cycles} cycles of loading, memory {reload(folder, cycles) / 1e6:+.1f} MB")


if __name__ == "__main__":
    main()
