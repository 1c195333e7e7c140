"""Seconds of a step by phase: of the clock alone, and in the metrics of real runs."""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recipes.report.metrics import collect
from recipes.report.plots import figures
from rl.phases import PHASES, PhaseClock

from ..helpers.rl import Vowels, run
from ..helpers.stages import lines


class SlowVowels(Vowels):
    def judge(self, answers):
        time.sleep(0.02)
        return super().judge(answers)


@given(st.lists(st.tuples(st.sampled_from(["open", "close"]), st.sampled_from(PHASES), st.integers(0, 9))))
def test_every_moment_counts_for_the_innermost_phase(moves):
    """Whatever is opened and closed when, the phases sum to the step."""
    now, ended = [0.0], []
    clock = PhaseClock(torch.device("cpu"), ended.append)
    wanted, opened = dict.fromkeys(PHASES, 0.0), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rl.phases.time.perf_counter", lambda: now[0])
        clock.on_step_begin()
        for move, name, seconds in moves:
            if move == "open":
                opened.append((name, clock.phase(name)))
                opened[-1][1].__enter__()
            elif opened:
                opened.pop()[1].__exit__(None, None, None)
            now[0] += seconds
            wanted[opened[-1][0] if opened else "update"] += seconds
        while opened:
            opened.pop()[1].__exit__(None, None, None)
        clock.on_step_end()
    assert ended == [wanted] and sum(ended[0].values()) == now[0]


def test_phases_are_in_every_line_and_sum_to_the_step(tmp_path):
    run(tmp_path, rewards=[SlowVowels("vowels")])
    log = [line for line in lines(tmp_path / "metrics.jsonl") if "loss" in line]
    assert len(log) == 4
    for line in log:
        seconds = {phase: line[f"seconds/{phase}"] for phase in PHASES}
        assert all(value > 0 for value in seconds.values()) and seconds["rewards"] >= 0.02
        assert sum(seconds.values()) == pytest.approx(line["step_time"])
    main, _ = figures(collect(lines(tmp_path / "metrics.jsonl"), []))
    assert any("Seconds of a step by phase" in str(chart) for chart in main)


def test_steps_on_earlier_rollouts_have_an_update_alone(tmp_path):
    """Lines are means over steps: of two updates on one rollout, one has none."""
    settings = {"num_iterations": 2, "beta": 0.0, "save_strategy": "no"}
    run(tmp_path / "one", training={**settings, "logging_steps": 1})
    run(tmp_path / "two", training={**settings, "logging_steps": 2})
    log = [line for line in lines(tmp_path / "one" / "metrics.jsonl") if "loss" in line]
    for rollout, later in (log[:2], log[2:]):
        assert rollout["seconds/rollout"] > 0 and rollout["seconds/rewards"] > 0
        assert rollout["seconds/reference"] > 0  # log-probabilities of the old policy
        assert later["seconds/rollout"] == later["seconds/rewards"] == later["seconds/reference"] == 0
        assert later["seconds/update"] == later["step_time"] > 0
    log = [line for line in lines(tmp_path / "two" / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in log] == [2, 4]
    assert all(sum(line[f"seconds/{p}"] for p in PHASES) == pytest.approx(line["step_time"]) for line in log)
