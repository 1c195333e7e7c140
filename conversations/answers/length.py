"""The rule `length`: the soft overlong penalty of DAPO (Yu et al. 2025, equation 13)."""

from conversations.answers.verdict import Count, Verdict
from conversations.errors import ToolkitError


def length(completion: str, *, tokens: Count, max_tokens: int, buffer: int) -> Verdict:
    """1 for an answer of at most max_tokens - buffer tokens, then linearly less, 0 from max_tokens on.

    The paper's penalty is from -1 to 0; this is that penalty plus 1, since a rule scores from 0 to 1. Among the answers
    to one prompt a constant makes no difference to GRPO's advantages, so a reward of weight w is the paper's penalty
    times w.

    Args:
        tokens: of the answer, its end token included; not counted from the text, which only its tokenizer could do.
        max_tokens: L_max of the paper (verl's max_resp_len), usually training.max_completion_length.
        buffer: L_cache of the paper (verl's overlong_buffer.len): over how many tokens the penalty grows.

    Raises:
        ToolkitError: the buffer is longer than max_tokens.
    """
    if buffer > max_tokens:
        raise ToolkitError(f"the rule length: buffer {buffer:,} is more than max_tokens {max_tokens:,}")
    free = max_tokens - buffer
    score = min(1.0, max(0.0, (max_tokens - tokens) / buffer))
    if score == 1:
        return Verdict(score, f"{tokens:,} tokens, of {free:,} without a penalty")
    return Verdict(score, f"{tokens:,} tokens: the penalty begins above {free:,} and is full at {max_tokens:,}")
