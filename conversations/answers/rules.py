"""All rules by name: the single entry point for rewards, evaluation and anything else that judges answers. No torch."""

import inspect
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from conversations.answers.choice import choice, choice_reference
from conversations.answers.code import code, code_reference, need_sandbox
from conversations.answers.form import format
from conversations.answers.gym import gym_reference, need_gym, reasoning_gym
from conversations.answers.ifeval import ifeval, ifeval_reference
from conversations.answers.language import language
from conversations.answers.lean import lean, lean_reference, need_lean
from conversations.answers.length import length
from conversations.answers.mathematics import math, math_reference
from conversations.answers.number import number, number_reference
from conversations.answers.refusing import refusal
from conversations.answers.repetition import repetition
from conversations.answers.verdict import Count, Verdict
from conversations.errors import ToolkitError

Prompt = str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Rule:
    """A rule.

    Args:
        judge: (completion, prompt=, reference=, settings) -> Verdict; it receives only the arguments it names.
        read_reference: raises ToolkitError for a reference that the rule cannot use; None if it needs none.
        of_rows: whether its references are rows of a data set rather than texts.
        need: (settings) -> None; raises ToolkitError on a machine that lacks what the rule needs.
        many: where many answers are judged: "here" (this thread), in "threads" (a rule that waits for its own
            processes) or in "processes" (one that computes for long, or may hang).
    """

    judge: Callable[..., Verdict]
    read_reference: Callable[[Any], Any] | None = None
    of_rows: bool = False
    need: Callable[[Mapping[str, Any]], None] | None = None
    many: Literal["here", "threads", "processes"] = "here"

    @property
    def needs_reference(self) -> bool:
        return self.read_reference is not None

    @property
    def parameters(self) -> frozenset[str]:
        """The arguments of `judge` besides the completion."""
        return frozenset(list(inspect.signature(self.judge).parameters)[1:])

    @property
    def optional(self) -> frozenset[str]:
        """The arguments of `judge` that have defaults."""
        parameters = inspect.signature(self.judge).parameters.items()
        return frozenset(name for name, parameter in parameters if parameter.default is not inspect.Parameter.empty)

    @property
    def settings(self) -> frozenset[str]:
        return self.parameters - {"prompt", "reference"}


RULES: dict[str, Rule] = {
    "math": Rule(math, math_reference, many="processes"),
    "number": Rule(number, number_reference),
    "refusal": Rule(refusal),
    "format": Rule(format),
    "language": Rule(language),
    "choice": Rule(choice, choice_reference),
    "repetition": Rule(repetition),
    "length": Rule(length),
    "ifeval": Rule(ifeval, ifeval_reference, of_rows=True),
    "code": Rule(code, code_reference, of_rows=True, need=need_sandbox, many="threads"),
    "lean": Rule(lean, lean_reference, need=need_lean, many="threads"),
    "reasoning_gym": Rule(reasoning_gym, gym_reference, of_rows=True, need=need_gym, many="processes"),
}


# Settings that the stage measures on each answer and passes to the rules that take them; no recipe sets them: whether
# the model ended the answer itself, and its number of tokens.
MEASURED = {"finished": True, "tokens": 0}


# What a setting must be, by the type of its default, or by its annotation if it has no default.
_KINDS: tuple[tuple[Any, str, Callable[[Any], bool]], ...] = (
    (bool, "true or false", lambda value: isinstance(value, bool)),
    (Count, "a non-negative whole number", lambda value: type(value) is int and value >= 0),
    (int, "a whole number from 1 to 1,000,000", lambda value: type(value) is int and 1 <= value <= 1_000_000),
    (float, "a number above 0, at most 1,000,000", lambda value: type(value) in (int, float) and 0 < value <= 1e6),
    (tuple, "a list", lambda value: isinstance(value, (list, tuple))),
    (str, "a text", lambda value: isinstance(value, str)),
    (type(None), "an object", lambda value: isinstance(value, Mapping)),
)


def find_rule(name: str) -> Rule:
    """The rule of this name. Raises ToolkitError, with the nearest name and all names, if there is none."""
    if name not in RULES:
        raise ToolkitError(f"unknown rule {name!r}{_nearest(name, RULES)}; the rules are: {', '.join(RULES)}")
    return RULES[name]


def check_rule(name: str, settings: Mapping[str, Any]) -> None:
    """Raises ToolkitError for an unknown rule, and for a missing, unknown or invalid setting."""
    _check_settings(name, settings)
    rule = RULES[name]
    measured = {key: value for key, value in MEASURED.items() if key in rule.settings}
    _refuse_unset(name, rule.settings - rule.optional - set(settings) - set(measured))
    if rule.settings and rule.parameters & {"prompt", "reference"} <= rule.optional:
        rule.judge("", **{**measured, **settings})  # validates them


def _refuse_unset(name: str, lacking: Set[str]) -> None:
    if lacking:
        several = "s" if len(lacking) > 1 else ""
        raise ToolkitError(f"the rule {name} needs the setting{several} {', '.join(sorted(lacking))}")


def _check_settings(name: str, settings: Mapping[str, Any]) -> None:
    rule = find_rule(name)
    unknown = sorted(set(settings) - rule.settings)
    if unknown:
        raise ToolkitError(
            f"the rule {name} has no setting {unknown[0]!r}{_nearest(unknown[0], rule.settings)}; "
            f"it has: {', '.join(sorted(rule.settings)) or 'none'}"
        )
    for key, value in settings.items():
        parameter = inspect.signature(rule.judge).parameters[key]
        needs = parameter.annotation if parameter.default is parameter.empty else type(parameter.default)
        wrong = next((needed for kind, needed, fits in _KINDS if needs is kind and not fits(value)), None)
        if wrong:
            raise ToolkitError(f"the setting {key} of the rule {name} must be {wrong}, not {value!r:.60}")


def check_machine(name: str, settings: Mapping[str, Any]) -> None:
    """Raises ToolkitError if this machine lacks what the rule needs."""
    if need := find_rule(name).need:
        need(settings)


def needs_reference(name: str) -> bool:
    """Whether the rule needs a reference; raises ToolkitError for an unknown rule."""
    return find_rule(name).needs_reference


def check_reference(name: str, reference: Any) -> None:
    """Raises ToolkitError if a rule that needs a reference cannot read this one."""
    rule = find_rule(name)
    if rule.read_reference is not None:
        rule.read_reference(reference if rule.of_rows else _reference_text(reference))


def verify(
    name: str, completion: str, *, prompt: Prompt | None = None, reference: Any = None, **settings: Any
) -> Verdict:
    """Judges an answer by a rule. No answer, however malformed, raises an exception.

    Args:
        name: the rule: math, number, choice, code, lean, refusal, format, language, repetition, length, ifeval,
            reasoning_gym.
        prompt: a text, or messages, of which the last user turn counts.
        reference: the right answer, a text or a number; for `code` a row with tests, for `ifeval` one
            with instructions, for `reasoning_gym` one that names its question.
        settings: the rule's settings: `patterns` of refusal, `finished` of format, `tokens`, `max_tokens` and `buffer`
            of length, `loose` and `partial` of ifeval, `partial`, `timeout`, `memory` and `allow_unsandboxed` of code,
            those of lean (conversations/answers/lean.py).

    Returns:
        The score, from 0 to 1 (None if the rule does not apply: no reference, no prompt, no tokens), and the reason.

    Raises:
        ToolkitError: an unknown, invalid or missing setting, an unknown rule, an answer, prompt or reference of another
            form, or, for `code` and `lean`, a machine without a sandbox or checker.
    """
    _check_settings(name, settings)
    rule = RULES[name]
    if not isinstance(completion, str):
        raise ToolkitError(f"an answer must be a text, not {completion!r:.60}")
    arguments = {
        "prompt": None if prompt is None else question_of(prompt),
        "reference": reference if reference is None or rule.of_rows else _reference_text(reference),
    }
    arguments = {key: value for key, value in arguments.items() if key in rule.parameters and value is not None}
    lacking = rule.parameters - rule.optional - set(arguments) - set(settings)
    _refuse_unset(name, lacking - {"prompt", "reference"} - set(MEASURED))
    if lacking:
        return Verdict(None, f"no {min(lacking)} to compare with")
    return rule.judge(completion, **arguments, **settings)


def question_of(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    questions = [message.get("content") for message in prompt if message.get("role") == "user"]
    question = questions[-1] if questions else ""
    if not isinstance(question, str):
        raise ToolkitError(f"a prompt must be a text, or messages with a text as content, not {question!r:.60}")
    return question


def _reference_text(reference: Any) -> str:
    if isinstance(reference, str):
        return reference
    if isinstance(reference, (int, float)) and not isinstance(reference, bool):
        return str(reference)
    raise ToolkitError(f"a reference must be a text or a number, not {reference!r:.60}")


def _nearest(name: str, names: Any) -> str:
    near = get_close_matches(name, list(names), 1, 0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""
