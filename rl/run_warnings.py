"""Says what goes wrong in a run, by its cause, while it can still be stopped."""

import sys
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from transformers import TrainerCallback

WINDOW = 10  # logged steps that must all show it, so that one odd batch says nothing
FALLEN = 0.05  # of avg@n on held-out prompts, below its best
COLLAPSED = 0.1  # of the entropy of the first steps
FAR = 1.0  # nats per token from the reference
ALL = 0.999

Lines = Sequence[Mapping[str, Any]]


def _last(lines: Lines, key: str) -> list[float] | None:
    """The last WINDOW values; None where there are fewer."""
    found = [line[key] for line in lines[-WINDOW:] if key in line]
    return found if len(found) == WINDOW else None


def hacked(lines: Lines, evaluations: Lines) -> str | None:
    """The reward rises and the held-out verifier falls."""
    key = next((key for line in evaluations[:1] for key in line if key.startswith("eval_avg@")), None)
    if key is None or len(evaluations) < 2:
        return None
    best, now = max(evaluations, key=lambda line: line[key]), evaluations[-1]
    then = [line["reward"] for line in lines if "reward" in line and line["step"] <= best["step"]][-WINDOW:]
    rewards = _last(lines, "reward")
    if not then or rewards is None or now[key] > best[key] - FALLEN or fmean(rewards) <= fmean(then):
        return None
    return (
        f"the reward rises ({fmean(then):.3g} at step {best['step']}, {fmean(rewards):.3g} now) while right answers to "
        f"held-out prompts fall ({best[key]:.3g} to {now[key]:.3g}): the policy learns the reward's faults or its "
        "training prompts by heart. Keep the best checkpoint, raise training.beta, or mend the reward"
    )


def collapsed(lines: Lines, evaluations: Lines) -> str | None:
    """Entropy collapse."""
    first, now = [line["entropy"] for line in lines[:WINDOW] if "entropy" in line], _last(lines, "entropy")
    if now is None or len(lines) < 2 * WINDOW or not first or fmean(now) > COLLAPSED * fmean(first):
        return None
    return (
        f"entropy has collapsed ({fmean(first):.3g} to {fmean(now):.3g} nats per token): answers to a prompt are all "
        "alike, and there is little left to learn from. Lower training.learning_rate, raise training.epsilon_high or "
        "training.temperature"
    )


def runaway(lines: Lines, evaluations: Lines) -> str | None:
    """KL runaway."""
    now = _last(lines, "kl")
    if now is None or min(now) < FAR:
        return None
    return (
        f"the policy runs away from its reference (KL {fmean(now):.3g} nats per token): raise training.beta, or lower "
        "training.learning_rate"
    )


def truncated(lines: Lines, evaluations: Lines) -> str | None:
    """No answer ends by itself."""
    now = _last(lines, "completions/clipped_ratio")
    if now is None or min(now) < ALL:
        return None
    return (
        f"all answers of the last {WINDOW} logged steps were cut off at training.max_completion_length: raise it, or "
        "look whether the model ends its answers at all (the template's end token)"
    )


def equal(lines: Lines, evaluations: Lines) -> str | None:
    """No group has any spread of rewards."""
    now = _last(lines, "frac_reward_zero_std")
    if now is None or min(now) < ALL:
        return None
    return (
        f"all answers to each prompt had the same reward in the last {WINDOW} logged steps, so that nothing is learnt: "
        "the prompts are too hard or too easy, or the reward does not tell answers apart"
    )


def dead(lines: Lines, evaluations: Lines) -> str | None:
    """Experts without a token."""
    now = _last(lines, "expert_load/dead")
    if now is None or min(now) < 1:
        return None
    return (
        f"at least {min(now):.0f} experts got no token in any of the last {WINDOW} logged steps: raise "
        "model.config.aux_loss_alpha, and look at the report's expert load"
    )


CAUSES = (hacked, collapsed, runaway, truncated, equal, dead)


class Warnings(TrainerCallback):
    """Prints each warning when it first applies; `said` keeps them, for the manifest. A run that resumes continues with
    the log of the run before, and with what was said then."""

    def __init__(self) -> None:
        self.lines: list[Mapping[str, Any]] = []
        self.evaluations: list[Mapping[str, Any]] = []
        self.said: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for line in state.log_history:
            self._new(line)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for why in self._new({"step": state.global_step, **(logs or {})}):
            if state.is_world_process_zero:
                print(f"rl: warning at step {state.global_step}: {why}", file=sys.stderr)

    def _new(self, line: Mapping[str, Any]) -> list[str]:
        """The warnings that apply from this line of the log on."""
        if "loss" in line:
            self.lines.append(line)
        elif any(key.startswith("eval_") for key in line):
            self.evaluations.append(line)
        unsaid = [cause for cause in CAUSES if cause.__name__ not in self.said]
        new = {cause.__name__: why for cause in unsaid if (why := cause(self.lines, self.evaluations))}
        self.said |= new
        return list(new.values())
