"""Custom rewards, with the signature of TRL's reward functions: lists in, a number (or None: no score) per answer out.

dsv2 rl recipes/tiny/rl_reasoning.yaml model.path=runs/tiny/sft 'rewards=[{python: "examples/my_rewards.py:exact"}]'
"""

import re


def exact(prompts, completions, reference, **kwargs):
    """1 if the last number of the answer equals the reference, otherwise 0."""
    return [float(last_number(text_of(answer)) == right) for answer, right in zip(completions, reference, strict=True)]


async def short(prompts, completions, **kwargs):
    """1 for no words, falling to 0 for 100 or more; a coroutine, as a reward that queries a server would be."""
    return [max(0.0, 1 - len(text_of(answer).split()) / 100) for answer in completions]


def text_of(answer):
    """The text of an answer, which is a list of messages."""
    return answer[-1]["content"]


def last_number(text):
    numbers = re.findall(r"-?\d+", text)
    return numbers[-1] if numbers else None
