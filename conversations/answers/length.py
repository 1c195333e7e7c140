"""The rule `length`: the soft overlong penalty of DAPO (Yu et al. 2025, equation 13)."""

from conversations.answers.verdict import Count, Verdict
from conversations.errors import ToolkitError


def length(completion: str, *, tokens: Count, max_tokens: int, buffer: int) -> Verdict:
    """1 for an answer of at most max_tokens - buffer tokens, then linearly less, 0 from max_tokens on.

    The paper's penalty ranges from -1 to 0; this is that penalty plus 1, since rules score from 0 to 1. A constant
    added to all answers of a prompt does not change GRPO's advantages, so a reward of weight w acts as the paper's
    penalty times w.

    Args:
        tokens: the answer's length in tokens, end token included. The stage passes it: only its tokenizer can count.
        max_tokens: L_max of the paper (verl's max_resp_len), usually training.max_completion_length.
        buffer: L_cache of the paper (verl's overlong_buffer.len): how many tokens the penalty takes to reach its
            maximum.

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
