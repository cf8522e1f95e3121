"""Interleaved timing on a clock of our own, the numbers of its tables, and what contenders run inside of."""

import os
import statistics

import pytest
import torch

from rebnn_hf.timing import Contender, check_threads, compare, cores, environment, interleave, quartiles, table, threads


class Clock:
    """Time passes only in the calls of contenders."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def __call__(self):
        return self.now

    def contender(self, name, *seconds):
        """Its calls take these times in turn, the last one from then on."""
        left = list(seconds)

        def call():
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return Contender(name, call)


def test_rounds_go_forth_and_back_with_an_untimed_call_in_each_turn():
    clock = Clock()
    contenders = [clock.contender(name, 1.0) for name in "abc"]
    interleave(contenders, rounds=3, clock=clock)
    assert "".join(clock.log[::2]) == "".join(clock.log[1::2]) == "cba" + "abc" + "cba" + "abc"


def test_first_call_of_a_turn_and_first_round_are_not_counted():
    clock = Clock()
    contender = clock.contender("a", 100, 50, 90, 3, 80, 5, 70, 4)
    assert interleave([contender], rounds=3, clock=clock) == {"a": [3, 5, 4]}


def test_a_turn_has_as_many_calls_as_fit():
    clock = Clock()
    times = interleave([clock.contender("fast", 0.25), clock.contender("slow", 8.0)], 2, turn=1.0, clock=clock)
    assert times == {"fast": [0.25, 0.25], "slow": [8.0, 8.0]}
    assert clock.log.count("fast") == 2 + 2 * (1 + 4)  # the first round has one call and one untimed
    assert clock.log.count("slow") == 3 * 2


def test_contenders_run_inside_of_their_context():
    seen = []

    def inside(value):
        return lambda: environment(REBNN_TEST=value)

    contenders = [Contender(v, lambda: seen.append(os.environ["REBNN_TEST"]), inside(v)) for v in ("x", "y")]
    interleave(contenders, 1, turn=0)
    assert seen == ["y", "y", "x", "x", "x", "x", "y", "y"]
    assert "REBNN_TEST" not in os.environ


@pytest.mark.parametrize("rounds", [0, -1])
def test_no_rounds_are_refused(rounds):
    with pytest.raises(ValueError, match="measures nothing"):
        interleave([], rounds)


def test_quartiles():
    assert quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == (2.0, 3.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_ratios_are_those_of_medians_baseline_over_own():
    times = {"ours": [1e-3, 9e-3, 2e-3], "base": [10e-3, 8e-3, 30e-3], "half": [5e-3]}
    ours, base, half = compare(times, ["base", "half", "absent"])
    assert list(ours) == ["contender", "median ms", "q1", "q3", "x base", "x half"]
    assert ours["median ms"] == pytest.approx(2) and ours["q1"] == pytest.approx(1.5)
    assert base["q3"] == pytest.approx(1e3 * statistics.mean([10e-3, 30e-3]))
    assert [row["x base"] for row in (ours, base, half)] == pytest.approx([5, 1, 2])
    assert [row["x half"] for row in (ours, base, half)] == pytest.approx([2.5, 0.5, 1])
    assert compare(times, [], "us")[0]["median us"] == pytest.approx(2000)


def test_table_has_three_digits_and_aligns():
    rows = [
        {"name": "a", "n": 1, "x": 1234.5},
        {"name": "long", "n": 10, "x": 0.012345},
        {"name": "b", "n": 2, "x": 0.0},
    ]
    assert table(rows).splitlines() == [
        "| name |  n |      x |",
        "| ---- | -: | -----: |",
        "| a    |  1 |   1234 |",
        "| long | 10 | 0.0123 |",
        "| b    |  2 |    0.0 |",
    ]


def test_threads_are_set_and_given_back(monkeypatch):
    monkeypatch.setattr("rebnn_hf.timing.cores", lambda: 3)
    before = torch.get_num_threads()
    with threads(3):
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("number", [0, cores() + 1])
def test_threads_beyond_the_cores_are_refused(number):
    with pytest.raises(ValueError, match=rf"{number} threads cannot be measured: .* {cores()} core"):
        check_threads(number)
    with pytest.raises(ValueError, match="cannot be measured"), threads(number):
        pass


def test_environment_is_given_back(monkeypatch):
    monkeypatch.setenv("REBNN_TEST", "before")
    with environment(REBNN_TEST="within", REBNN_OTHER="new"):
        assert (os.environ["REBNN_TEST"], os.environ["REBNN_OTHER"]) == ("within", "new")
    assert os.environ["REBNN_TEST"] == "before" and "REBNN_OTHER" not in os.environ
