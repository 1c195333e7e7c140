"""The table of known row formats, and the conversion of a row to canonical form (conversations/row.py)."""

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

# Keys that rows of every format may have besides their own.
COMMON_KEYS = ("system", "tools", "reference", "meta")

# Another name of a key -> ours; used if the row has no value under our name.
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
    """A row format, recognised by its keys: the first entry of FORMATS whose keys the row has is its format.

    Args:
        name: for messages.
        keys: present in every row, and not null.
        convert: source row -> canonical row.
        optional: further keys that `convert` reads; all other keys go to `meta`.
        plain: for a format with a verdict: the `columns` that make its rows conversations without one.
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
    """The optional keys of a format whose question is one of `keys`."""
    return tuple(key for key in (*MORE, "history") if key not in keys)


# (the two outputs, the columns that say which is better, the number of the first): LLMBar and AlpacaFarm; PKU-SafeRLHF.
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

# Longer key sets come before shorter ones that they contain.
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
_COMPARED = frozenset(format.name for format in (*_PAIRS, *_RANKED))  # two answers each
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
    *(key for format in _RANKED for key in format.keys[3:]),
}


# --- What the reader calls


def recognise(row: Mapping[str, Any]) -> Format | None:
    """The format of a source row, by its keys; a key whose value is null counts as absent."""
    return _with_keys(frozenset(key for key, value in row.items() if value is not None))


@lru_cache(maxsize=1024)
def _with_keys(present: frozenset[str]) -> Format | None:
    return next((format for format in FORMATS if present.issuperset(format.keys)), None)


def convert_row(
    row: Row, columns: Mapping[str, str] | None = None, rules: Rules | None = None, events: list[Event] | None = None
) -> tuple[Format, Row]:
    """The format of a source row and its canonical form.

    Args:
        columns: {key of a known format: the source's name for it}, applied first.
        rules: how turns are read.
        events: receives an entry for everything in the row that was not used.

    Raises:
        BadRow: no known format fits, or the row does not conform to its format; with the reason.
    """
    rules, events = rules or Rules(), [] if events is None else events
    columns = columns or {}
    row = _with_our_names(renamed(row, columns))
    format = recognise(row)
    if format is None:
        raise _unknown(row)
    read = (*format.keys, *format.optional, *COMMON_KEYS, *((MARGIN,) if format.name in _COMPARED else ()))
    unread = {key: row[key] for key in row if key not in read}
    unread = {key: value for key, value in unread.items() if value is not None}
    flags = None
    if unread:
        refuse_media({key: value for key, value in unread.items() if key not in columns}, "the row")
        flags = row_flags(unread, _turns_of(row, format))
    converted = format.convert(_with_turns(row, format, flags, rules, events))
    reasoning = _column_reasoning(converted, unread, rules) if unread else None
    _apply(converted, flags, reasoning, rules, events)
    if row.get("reference") not in (None, "") and "reference" not in format.optional:
        converted["reference"] = reference_text(row["reference"])
    if format.name in _COMPARED and row.get(MARGIN) not in (None, ""):
        converted[MARGIN] = read_number(row[MARGIN], MARGIN)
    unused = [key for key in unread if key != "kind" and not is_row_flag(key) and not (reasoning and is_reasoning(key))]
    events.extend(("columns", str(key)) for key in unused)
    meta = converted.pop("meta", {}) | unread
    source_meta = row.get("meta")
    meta = (
        source_meta | meta
        if isinstance(source_meta, dict)
        else meta | ({} if source_meta is None else {"meta": source_meta})
    )
    return format, converted | ({"meta": meta} if meta else {})


def _turns_of(row: Row, format: Format) -> int | None:
    """The number of turns of the row's conversation; None if it is not one list of turns."""
    turns = turns_in(row[format.keys[0]], format.keys[0], True) if format.keys[0] in _CONVERSATIONS else None
    return len(turns) if isinstance(turns, list) else None


def _with_turns(
    row: Row, format: Format, flags: list[tuple[str, bool]] | None, rules: Rules, events: list[Event]
) -> Row:
    """The row with turns in place of the raw values of the columns that its format reads."""
    reader = TurnReader(rules, events)
    read = {}
    for key in (*format.keys, *format.optional):
        if row.get(key) is None or key in _NO_TURNS:
            continue
        turns = turns_in(row[key], key, key in _CONVERSATIONS)
        if turns is not None:
            read[key] = reader.turns(turns, key, flags if key in _CONVERSATIONS else None)
    return row | read


def _column_reasoning(converted: Row, unread: Row, rules: Rules) -> tuple[str, str] | None:
    """The column that holds the reasoning of the row's answer, and its text."""
    if "text" in converted:
        return None
    messages = converted.get("messages") or converted.get("completion") or []
    return column_reasoning(unread, sum(message["role"] == "assistant" for message in messages), rules.reasoning)


def _apply(
    converted: Row,
    flags: list[tuple[str, bool]] | None,
    reasoning: tuple[str, str] | None,
    rules: Rules,
    events: list[Event],
) -> None:
    """Applies the row's own columns to its last answer: whether it is trained, and its reasoning."""
    answer = (converted.get("messages") or converted.get("completion") or [{"role": ""}])[-1]
    is_answer = answer["role"] == "assistant"
    off = next((name for name, flag in flags or () if not flag), None)
    if off and not (is_answer and "messages" in converted):
        raise BadRow(f"the row has {off} false, which cannot be honoured here: remove the row")
    if off and all(not flag for _, flag in flags or ()):  # the flag covers the whole row, in whichever form
        for message in converted["messages"]:
            if message["role"] == "assistant" and message.get("train") is not False:
                message["train"] = False
                events.append(("untrained", off))
    if reasoning and is_answer:
        answer["content"] = with_reasoning(answer["content"], reasoning, rules.reasoning, "the row")
    elif reasoning and rules.reasoning != "drop":
        raise BadRow(
            f"the row has {reasoning[0]}, but no answer to attach it to (format.reasoning: drop leaves it out)"
        )
    if reasoning and rules.reasoning == "drop":
        events.append(("dropped reasoning", reasoning[0]))


def _unknown(row: Row) -> BadRow:
    """Why a row has no format: one of the keys of its format is null, or no format has its keys."""
    if null := null_keys(row):
        return BadRow(f"{' and '.join(null)} {'is' if len(null) == 1 else 'are'} null")
    return UnknownFormat(f"no known format has the keys {', '.join(map(str, row)) or '(none)'}")


def null_keys(row: Row, columns: Mapping[str, str] | None = None) -> list[str]:
    """Null keys that would give the row another format if they had values, under the file's names for them."""
    columns = columns or {}
    try:
        row = _with_our_names(renamed(row, columns))
    except BadRow:
        return []
    intended = _with_keys(frozenset(row))
    current = recognise(row)
    if intended is None or intended is current:
        return []
    return [columns.get(key, key) for key in intended.keys if row[key] is None]


def _with_our_names(row: Row) -> Row:
    """The row with our names for the keys that it names differently."""
    if "preferred_output" in row and isinstance(row.get("input"), dict):  # OpenAI's preference rows
        rest = {key: value for key, value in row.items() if key not in _OPENAI_PAIR}
        prompt = {"prompt": row["input"].get("messages"), "tools": row["input"].get("tools")}
        return rest | prompt | {our_key: row.get(source_key) for source_key, our_key in _OPENAI_PAIR.items() if our_key}
    if "prompt" in row and all(map(_are_texts, (row.get(PAIR[1]), row.get(PAIR[2])))):  # RewardBench 2's
        lists: dict[str, str] = dict(zip(PAIR[1:], RANKED[1:], strict=True))
        return {lists.get(key, key): value for key, value in row.items()}
    renaming = {
        source_key: our_key for source_key, our_key in OTHER_NAMES.items() if row.get(source_key) not in (None, "", [])
    }
    renaming = {
        source_key: our_key
        for source_key, our_key in renaming.items()
        if row.get(our_key) in (None, "", [], row[source_key])
    }
    if "chosen" in renaming.values() and row.get("rejected") is None and row.get("rejected_response") is not None:
        renaming["rejected_response"] = "rejected"
    if not renaming:
        return row
    rest = {key: value for key, value in row.items() if key not in renaming}
    return rest | {our_key: row[source_key] for source_key, our_key in renaming.items()}


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    nested = {source: inner for source in columns.values() if source not in row and (inner := _inside(row, source))}
    row = row | {source: inner[0] for source, inner in nested.items()}
    for source in columns.values():
        if source not in row:
            raise BadRow(f"has no column {source!r}; its columns are {', '.join(map(str, row))}")
    renamed = {key: value for key, value in row.items() if key not in columns.values() and key not in columns}
    return renamed | {key: row[source] for key, source in columns.items()}


def _inside(row: Row, path: str) -> tuple[Any] | None:
    """The value at a path of keys (`reward_model.ground_truth`), in a tuple; None if there is none."""
    value: Any = row
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            return None
        value = value[key]
    return (value,)
