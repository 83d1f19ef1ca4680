"""Collecting against the engine alone: the same prompts each time, and a report that says what was measured."""

from __future__ import annotations

from serving.bench.collect import Measured, markdown, texts
from serving.bench.machine import read_machine
from serving.bench.statistics import paired_ratio


def test_prompts_are_the_same_each_time_and_of_different_lengths() -> None:
    made = texts(40)
    assert made == texts(40)
    assert len(set(made)) == 40
    words = [len(text.split()) for text in made]
    assert max(words) > 4 * min(words)


def test_the_report_states_the_ratio_and_every_round() -> None:
    plain, collecting = (200.0, 100.0, 400.0), (180.0, 95.0, 400.0)
    measured = Measured(plain, collecting, paired_ratio(collecting, plain), prompts=7, tokens=12345, flags=("--x", "1"))
    report = markdown(measured, read_machine(), "the command")
    assert f"**{(0.9 * 0.95) ** (1 / 3):.3f}**" in report
    for line in (
        "| 1 | 200.0 | 180.0 | 0.900 |",
        "| 3 | 400.0 | 400.0 | 1.000 |",
        "`the command`",
        "`--x 1`",
        "12,345",
    ):
        assert line in report
