"""The known formats of rows, as a table, and how a row of one of them becomes canonical (conversations/row.py)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

from conversations.formats.bad_row import BadRow
from conversations.formats.conversions import (
    MORE,
    conversation,
    esft_test,
    gsm8k_question,
    judged,
    mbpp_task,
    mt_bench,
    pair,
    plain_text,
    prompt_only,
    question,
    ranked,
    read_number,
    reference_text,
    right_and_wrong,
    self_instruct,
    swift_answers,
    swift_pair,
    tool_calls,
    whole_pair,
    with_checks,
)
from conversations.formats.media import refuse_media
from conversations.formats.reasoning import column_reasoning, is_reasoning, with_reasoning
from conversations.formats.training_flags import is_row_flag, row_flags
from conversations.formats.turn_reading import Rules, TurnReader, turns_in
from conversations.row import MARGIN, PAIR, RANKED, VERDICTS, Row
from conversations.tally import Event

# Keys that every format may have beside its own.
COMMON_KEYS = ("system", "tools", "reference", "meta")

# Other names of a key -> ours, which they are where the row has none of its own.
OTHER_NAMES = {
    "system_prompt": "system",
    "system_message": "system",
    "functions": "tools",
    "kto_tag": "label",
    "chosen_response": "chosen",
}

_OPENAI_PAIR = {"input": "", "preferred_output": "chosen", "non_preferred_output": "rejected"}


class UnknownFormat(BadRow):
    """A row whose keys fit no known format."""


@dataclass(frozen=True)
class Format:
    """A format is recognised by its keys: a row has the first entry of FORMATS whose keys it has.

    name: for the user. keys: all are there, and not null. convert: source row -> canonical row.
    optional: further keys that `convert` reads; what else a row has goes to `meta`. plain: `columns` that make such a
    row, which holds a verdict, a conversation without one.
    """

    name: str
    keys: tuple[str, ...]
    convert: Callable[[Row], Row]
    optional: tuple[str, ...] = ()
    plain: Mapping[str, str] = field(default_factory=dict)


# --- The table

_CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
_NAMES = {"messages": "messages", "conversations": "ShareGPT"}
_ANSWERS = ("completion", "response", "answer", "output")


def _more(*keys: str) -> tuple[str, ...]:
    """The optional keys of a format with one question in one of these keys."""
    return tuple(key for key in (*MORE, "history") if key not in keys)


# (the two outputs, who says which is better, the number of the first): LLMBar and AlpacaFarm; PKU-SafeRLHF.
_RANKINGS = (
    (("output_1", "output_2"), ("label", "preference"), 1),
    (("response_0", "response_1"), ("better_response_id", "safer_response_id"), 0),
)

_RANKED = tuple(
    Format(
        f"ranked pairs ({verdict})",
        (prompt_key, *outputs, verdict),
        partial(ranked, prompt_key=prompt_key, outputs=outputs, verdict=verdict, base=base),
        _more(prompt_key),
    )
    for outputs, verdicts, base in _RANKINGS
    for verdict in verdicts
    for prompt_key in ("instruction", "prompt", "input", "question")
)

_PAIRS = (
    *(
        Format(
            f"preference pairs with {key}",
            (key, "chosen", "rejected"),
            partial(pair, prompt_key=key),
            _more(key),
            {"prompt": key, "completion": "chosen"},
        )
        for key in ("prompt", *_CONVERSATIONS, "question", "instruction", "query", "input")
    ),
    Format("preference pairs", ("chosen", "rejected"), whole_pair, plain={"messages": "chosen"}),
    *(
        Format(
            f"{key} with rejected_response",
            (key, "rejected_response"),
            partial(swift_pair, key=key),
            ("history",),
            {"verdict": "rejected_response"},
        )
        for key in _CONVERSATIONS
    ),
    *(
        Format(
            f"{key}/response with rejected_response",
            (key, "response", "rejected_response"),
            partial(swift_answers, prompt_key=key, answer_key="response"),
            _more(key),
            {"verdict": "rejected_response"},
        )
        for key in ("query", "prompt", "instruction")
    ),
)


_IFEVAL = ("instruction_id_list", "kwargs")


def _question(prompt_key: str, answer_key: str) -> Format:
    convert = gsm8k_question if (prompt_key, answer_key) == ("question", "answer") else question
    return Format(
        f"{prompt_key}/{answer_key}",
        (prompt_key, answer_key),
        partial(convert, prompt_key=prompt_key, answer_key=answer_key),
        _more(prompt_key),
    )


_ANSWERED = (
    *(
        Format(_NAMES.get(key, key), (key,), partial(conversation, key=key), ("history",)) for key in _CONVERSATIONS
    ),
    *(_question("instruction", key) for key in ("output", "response", "answer", "completion")),
    _question("question", "answer"),
    *(_question("prompt", key) for key in (*_ANSWERS, "canonical_solution")),
    *(_question(prompt_key, key) for prompt_key in ("question", "query", "input") for key in _ANSWERS
      if (prompt_key, key) != ("question", "answer")),
)  # fmt: skip

_HUMANEVAL = ("prompt", "entry_point", "test")
_MBPP = ("test_list", "test_setup_code", "test_imports")
_TESTED = (
    Format(
        "HumanEval problems with their solution",
        (*_HUMANEVAL, "canonical_solution"),
        partial(
            with_checks,
            convert=partial(question, prompt_key="prompt", answer_key="canonical_solution"),
            checks=_HUMANEVAL,
        ),
    ),
    Format(
        "HumanEval problems",
        _HUMANEVAL,
        partial(with_checks, convert=partial(prompt_only, key="prompt"), checks=_HUMANEVAL),
    ),
    *(
        Format(
            f"MBPP tasks ({task}{' with code' if answer else ''})",
            (task, *answer, _MBPP[0]),
            partial(
                with_checks,
                convert=partial(mbpp_task, task_key=task, answer_key=answer[0] if answer else None),
                checks=_MBPP,
            ),
            _MBPP[1:],
        )
        for answer in (("code",), ())
        for task in ("text", "prompt")
    ),
)

JUDGED_FORMATS = tuple(
    Format(
        f"{source.name} with {verdict}",
        (*source.keys, verdict),
        partial(judged, convert=source.convert, verdict=verdict),
        source.optional,
        {"verdict": verdict},
    )
    for source in _ANSWERED
    for verdict in VERDICTS
)

# Longer sets of keys come before the shorter ones that they contain.
FORMATS: tuple[Format, ...] = (
    Format("right and wrong answers", RANKED, right_and_wrong, _more("prompt")),
    *_PAIRS,
    *_RANKED,
    *JUDGED_FORMATS,
    *_TESTED,
    Format("Self-Instruct tasks", ("instruction", "instances"), self_instruct),
    *_ANSWERED,
    Format("questions with tool calls", ("query", "answers"), partial(tool_calls, prompt_key="query", key="answers")),
    Format(
        "IFEval prompts",
        ("prompt", *_IFEVAL),
        partial(with_checks, convert=partial(prompt_only, key="prompt"), checks=_IFEVAL),
    ),
    Format("ESFT test prompts", ("prompt", "answers"), esft_test),
    Format("prompts", ("prompt",), partial(prompt_only, key="prompt"), _more("prompt")),
    Format("MT-Bench questions (the first turn)", ("question_id", "turns"), mt_bench, ("reference",)),
    Format("plain text", ("text",), plain_text),
)
_COMPARED = frozenset(known.name for known in (*_PAIRS, *_RANKED))  # two answers each
# Columns that never hold turns of a conversation.
_NO_TURNS = {
    *VERDICTS,
    "reference",
    *RANKED[1:],
    "answers",
    "turns",
    "instances",
    "text",
    *_HUMANEVAL[1:],
    *_MBPP,
    *_IFEVAL,
    *(key for known in _RANKED for key in known.keys[3:]),
}


# --- What the reader calls


def recognise(row: Mapping[str, Any]) -> Format | None:
    """The format of a source row, by its keys; a key whose value is null counts as absent."""
    return _with_keys(frozenset(key for key, value in row.items() if value is not None))


@lru_cache(maxsize=1024)
def _with_keys(present: frozenset[str]) -> Format | None:
    return next((known for known in FORMATS if present.issuperset(known.keys)), None)


def convert_row(
    row: Row, columns: Mapping[str, str] | None = None, rules: Rules | None = None, events: list[Event] | None = None
) -> tuple[Format, Row]:
    """The format of a source row and its canonical form.

    columns: {key of a known format: name that the source has for it}, applied first. rules: how turns are read.
    events: receives what the row has that nothing used.
    Raises BadRow with the reason where no format is known, or the row does not conform to it.
    """
    rules, events = rules or Rules(), [] if events is None else events
    columns = columns or {}
    row = _with_our_names(renamed(row, columns))
    known = recognise(row)
    if known is None:
        raise _unknown(row)
    read = (*known.keys, *known.optional, *COMMON_KEYS, *((MARGIN,) if known.name in _COMPARED else ()))
    others = {key: row[key] for key in row if key not in read}
    others = {key: value for key, value in others.items() if value is not None}
    flags = None
    if others:
        refuse_media({key: value for key, value in others.items() if key not in columns}, "the row")
        flags = row_flags(others, _turns_of(row, known))
    converted = known.convert(_with_turns(row, known, flags, rules, events))
    thought = _thought(converted, others, rules) if others else None
    _apply(converted, flags, thought, rules, events)
    if row.get("reference") not in (None, "") and "reference" not in known.optional:
        converted["reference"] = reference_text(row["reference"])
    if known.name in _COMPARED and row.get(MARGIN) not in (None, ""):
        converted[MARGIN] = read_number(row[MARGIN], MARGIN)
    unused = [key for key in others if key != "kind" and not is_row_flag(key) and not (thought and is_reasoning(key))]
    events.extend(("columns", str(key)) for key in unused)
    meta = converted.pop("meta", {}) | others
    own = row.get("meta")
    meta = own | meta if isinstance(own, dict) else meta | ({} if own is None else {"meta": own})
    return known, converted | ({"meta": meta} if meta else {})


def _turns_of(row: Row, known: Format) -> int | None:
    """How many turns the row's conversation has; None where it is not one list of turns."""
    turns = turns_in(row[known.keys[0]], known.keys[0], True) if known.keys[0] in _CONVERSATIONS else None
    return len(turns) if isinstance(turns, list) else None


def _with_turns(
    row: Row, known: Format, flags: list[tuple[str, bool]] | None, rules: Rules, events: list[Event]
) -> Row:
    """The row with its turns read, in the columns that its format reads."""
    reader = TurnReader(rules, events)
    read = {}
    for key in (*known.keys, *known.optional):
        if row.get(key) is None or key in _NO_TURNS:
            continue
        turns = turns_in(row[key], key, key in _CONVERSATIONS)
        if turns is not None:
            read[key] = reader.turns(turns, key, flags if key in _CONVERSATIONS else None)
    return row | read


def _thought(converted: Row, others: Row, rules: Rules) -> tuple[str, str] | None:
    """The column of the row that holds the reasoning of its answer, and its text."""
    if "text" in converted:
        return None
    said = converted.get("messages") or converted.get("completion") or []
    return column_reasoning(others, sum(message["role"] == "assistant" for message in said), rules.reasoning)


def _apply(
    converted: Row,
    flags: list[tuple[str, bool]] | None,
    thought: tuple[str, str] | None,
    rules: Rules,
    events: list[Event],
) -> None:
    """What the row's own columns say of its last answer: whether it is trained, and its reasoning."""
    answer = (converted.get("messages") or converted.get("completion") or [{"role": ""}])[-1]
    is_answer = answer["role"] == "assistant"
    off = next((name for name, flag in flags or () if not flag), None)
    if off and not (is_answer and "messages" in converted):
        raise BadRow(f"the row has {off} false, which cannot be honoured here: remove the row")
    if off and all(not flag for _, flag in flags or ()):  # the row as a whole, whatever its form
        for message in converted["messages"]:
            if message["role"] == "assistant" and message.get("train") is not False:
                message["train"] = False
                events.append(("untrained", off))
    if thought and is_answer:
        answer["content"] = with_reasoning(answer["content"], thought, rules.reasoning, "the row")
    elif thought and rules.reasoning != "drop":
        raise BadRow(f"the row has {thought[0]}, but no answer to attach it to (format.reasoning: drop leaves it out)")
    if thought and rules.reasoning == "drop":
        events.append(("dropped reasoning", thought[0]))


def _unknown(row: Row) -> BadRow:
    """Why a row has no format: one of a format's keys is null, or there is none with its keys."""
    if null := null_keys(row):
        return BadRow(f"{' and '.join(null)} {'is' if len(null) == 1 else 'are'} null")
    return UnknownFormat(f"no known format has the keys {', '.join(map(str, row)) or '(none)'}")


def null_keys(row: Row, columns: Mapping[str, str] | None = None) -> list[str]:
    """Keys without a value that would make the row one of another format, under the file's names for them."""
    columns = columns or {}
    try:
        row = _with_our_names(renamed(row, columns))
    except BadRow:
        return []
    wanted = _with_keys(frozenset(row))
    now = recognise(row)
    if wanted is None or wanted is now:
        return []
    return [columns.get(key, key) for key in wanted.keys if row[key] is None]


def _with_our_names(row: Row) -> Row:
    """The row with our names for keys of ours that it calls otherwise."""
    if "preferred_output" in row and isinstance(row.get("input"), dict):  # OpenAI's preference rows
        rest = {key: value for key, value in row.items() if key not in _OPENAI_PAIR}
        prompt = {"prompt": row["input"].get("messages"), "tools": row["input"].get("tools")}
        return rest | prompt | {ours: row.get(theirs) for theirs, ours in _OPENAI_PAIR.items() if ours}
    if "prompt" in row and all(map(_are_texts, (row.get(PAIR[1]), row.get(PAIR[2])))):  # RewardBench 2's
        lists: dict[str, str] = dict(zip(PAIR[1:], RANKED[1:], strict=True))
        return {lists.get(key, key): value for key, value in row.items()}
    named = {theirs: ours for theirs, ours in OTHER_NAMES.items() if row.get(theirs) not in (None, "", [])}
    named = {theirs: ours for theirs, ours in named.items() if row.get(ours) in (None, "", [], row[theirs])}
    if "chosen" in named.values() and row.get("rejected") is None and row.get("rejected_response") is not None:
        named["rejected_response"] = "rejected"
    if not named:
        return row
    rest = {key: value for key, value in row.items() if key not in named}
    return rest | {ours: row[theirs] for theirs, ours in named.items()}


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    nested = {source: inner for source in columns.values() if source not in row and (inner := _inside(row, source))}
    row = row | {source: inner[0] for source, inner in nested.items()}
    for source in columns.values():
        if source not in row:
            raise BadRow(f"has no column {source!r}; its columns are {', '.join(map(str, row))}")
    renamed = {key: value for key, value in row.items() if key not in columns.values() and key not in columns}
    return renamed | {key: row[source] for key, source in columns.items()}


def _inside(row: Row, path: str) -> tuple[Any] | None:
    """What stands at a path of keys (`reward_model.ground_truth`), in a tuple; None where there is nothing."""
    value: Any = row
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            return None
        value = value[key]
    return (value,)
