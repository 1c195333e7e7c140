"""Rewards of one's own, as TRL takes them too: lists in, a number (or None: nothing to say) for each answer out.

dsv2 rl recipes/tiny/rl_reasoning.yaml 'rewards=[{python: "examples/my_rewards.py:exact"}]'
"""

import re


def exact(prompts, completions, reference, **kwargs):
    """1 where the last number of the answer is the reference, else 0."""
    return [float(last_number(text_of(answer)) == right) for answer, right in zip(completions, reference, strict=True)]


async def short(prompts, completions, **kwargs):
    """1 for no words, 0 for 100 and more; a coroutine, as one that asks a server would be."""
    return [max(0.0, 1 - len(text_of(answer).split()) / 100) for answer in completions]


def text_of(answer):
    """An answer is a list of messages."""
    return answer[-1]["content"]


def last_number(text):
    numbers = re.findall(r"-?\d+", text)
    return numbers[-1] if numbers else None
