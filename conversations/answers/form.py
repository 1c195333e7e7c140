"""The rule `format`: whether the answer is a complete, well-formed text."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

from conversations.answers.text import compiled, matches, prose, sentences
from conversations.answers.verdict import Verdict, judged, shown
from conversations.errors import ToolkitError

_LABEL = re.compile(r"(?:^|\n)\s*(?:User|Assistant)\s*:|<｜[^｜]*｜>")
_LAUGHS = "哈嘿呵嘻哇啊嗯呜唉哼"
_STUTTERS = (
    (re.compile(r"(?<!\w)([^\W\d_]+)(?:[\s,]+\1){4}(?!\w)", re.IGNORECASE), "a word"),
    (re.compile(r"(?<![\w.])(\d{2,}(?:\.\d+)?)(?:\s+\1){2}(?![\w.])"), "a number"),
    (re.compile(r"(?<![\w.])(\d)(?:\s+\1){5}(?![\w.])"), "a number"),
    (re.compile(rf"((?![{_LAUGHS}])[一-鿿])\1{{4}}|([一-鿿]{{2,6}}?)(?:[\s，、]?\2){{4}}"), "a word"),
    (re.compile(r"([^\W\d_]{3,20})\1{4}"), "a syllable"),
    (re.compile(r"([^\W\d_])\1{15}"), "a letter"),
)
_LEAST_WORDS = 3  # shorter sentences may be repeated
_MOST_TIMES = 3  # a sentence that occurs this often anywhere counts as repeated


_JSON_BLOCK = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n[ \t]*```", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(r"[A-Za-z_][\w.-]*")


def format(
    completion: str,
    *,
    finished: bool = True,
    patterns: Sequence[str] = (),
    tags: Sequence[str] = (),
    schema: Mapping[str, Any] | None = None,
) -> Verdict:
    """1 for text that the model ended itself, without template labels, special tokens or repetition.

    Words in code and formulas may repeat.

    Args:
        finished: False if the answer was cut off at the token limit.
        patterns: regular expressions; if there are any, one must match the whole answer.
        tags: names of tags that must occur in the answer exactly once each, in this order, none of them empty.
        schema: a JSON schema; the answer, or its only fenced block, must be JSON that conforms to it.

    Raises:
        ToolkitError: a pattern is not a regular expression, or takes too long; a tag is not a name; the schema is not
            a JSON schema.
    """
    forms = compiled(tuple(patterns), "the format pattern")
    for tag in tags:
        if not isinstance(tag, str) or not _TAG.fullmatch(tag):
            raise ToolkitError(f"tags of the rule format must be names, such as [think, answer], not {tag!r:.60}")
    validator = None if schema is None else _validator(_as_json(schema))
    text = completion.strip()
    if not finished:
        return judged(False, "the answer was cut off at the token limit")
    if not text:
        return judged(False, "the answer is empty")
    label = _LABEL.search(text)
    if label:
        return judged(False, f"the answer contains {shown(label[0].strip())}")
    wrong = _wrong_tags(text, tags) or (validator and _wrong_json(text, validator))
    if wrong:
        return judged(False, wrong)
    text = prose(text)
    for pattern, unit in _STUTTERS:
        match = next((m for m in pattern.finditer(text) if not set(m[0]) <= set(_LAUGHS)), None)
        if match:
            return judged(False, f"the answer repeats {unit}: {shown(match[0])}")
    repeated = _repeated_sentence(text)
    if repeated:
        return judged(False, f"the answer repeats a sentence: {shown(repeated)}")
    if forms and not any(matches(form, completion.strip(), whole=True) for form in forms):
        return judged(False, "the answer matches none of the patterns")
    return judged(True, "the answer is well formed")


def _wrong_tags(text: str, tags: Sequence[str]) -> str | None:
    """Why the answer does not contain the tags as required; None if it does."""
    end = 0
    for tag in tags:
        elements = list(re.finditer(rf"<{re.escape(tag)}>(.*?)</{re.escape(tag)}>", text, re.DOTALL))
        marks = text.count(f"<{tag}>") + text.count(f"</{tag}>")
        if len(elements) != 1 or marks != 2:
            return f"the answer has {'no' if not marks else 'not just one'} <{tag}>...</{tag}>"
        if not elements[0][1].strip():
            return f"<{tag}> is empty"
        if elements[0].start() < end:
            return f"<{tag}> comes before the tag that it must follow"
        end = elements[0].end()
    return None


def _wrong_json(text: str, validator: Any) -> str | None:
    """Why the answer is not JSON that conforms to the schema; None if it is."""
    blocks = _JSON_BLOCK.findall(text)
    try:
        value = json.loads(blocks[0] if len(blocks) == 1 else text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        return f"the answer is not JSON: {str(error)[:100]}"
    from referencing.exceptions import Unresolvable

    try:
        error = next(validator.iter_errors(value), None)
    except (RecursionError, OverflowError) as fault:  # nested by the hundred, a number of hundreds of digits
        return f"the JSON cannot be checked: {fault}"
    except Unresolvable as fault:
        raise ToolkitError(f"schema of the rule format refers to what it does not define: {fault}") from None
    return None if error is None else f"the JSON does not conform: {error.json_path}: {error.message[:100]}"


def _no_constant(name: str) -> None:
    """Refuses NaN and Infinity, which Python reads, but which are not JSON (RFC 8259)."""
    raise ValueError(f"{name} is not a JSON value")


def _as_json(schema: Any) -> str:
    try:
        return json.dumps(schema)
    except (TypeError, ValueError) as error:
        raise ToolkitError(f"schema of the rule format must be a JSON schema: {error}") from error


@lru_cache(maxsize=16)
def _validator(text: str) -> Any:
    """Raises ToolkitError for what is not a schema, or refers to another schema, which is never downloaded."""
    from jsonschema import Draft202012Validator, SchemaError
    from jsonschema.validators import extend, validator_for
    from referencing import Registry, Resource
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    schema = json.loads(text)
    try:
        kind: Any = validator_for(schema, default=Draft202012Validator)
        kind.check_schema(schema)
    except SchemaError as error:
        raise ToolkitError(
            f"schema of the rule format is not a JSON schema: {error.json_path}: {error.message}"
        ) from None
    outside = re.search(r'"\$(?:dynamic)?ref": "(?!#)([^"]*)"', text, re.IGNORECASE)
    if outside:
        raise ToolkitError(f"schema of the rule format refers to {outside[1]!r}, which is not looked up: write it out")
    if '"$id"' not in text:  # which would change what "#" means
        resolver = Registry().with_resource("", Resource.from_contents(schema, DRAFT202012)).resolver()
        for name in re.findall(r'"\$ref": "(#[^"]*)"', text):
            try:
                resolver.lookup(name)
            except Unresolvable:
                raise ToolkitError(f"schema of the rule format refers to {name!r}, which it does not define") from None
    return extend(kind, {"pattern": _pattern, "patternProperties": _pattern_properties})(schema, registry=Registry())


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[Any]:
    """jsonschema's `pattern`, with a time limit."""
    from jsonschema import ValidationError

    if validator.is_type(instance, "string") and not _matches(pattern, instance):
        yield ValidationError(f"{shown(instance)} does not match {pattern!r}")


def _pattern_properties(validator: Any, patterns: Mapping[str, Any], instance: Any, schema: Any) -> Iterator[Any]:
    """jsonschema's `patternProperties`, with a time limit."""
    for pattern, subschema in patterns.items() if validator.is_type(instance, "object") else ():
        for key, value in instance.items():
            if _matches(pattern, key):
                yield from validator.descend(value, subschema, path=key, schema_path=pattern)


def _matches(pattern: str, text: str) -> bool:
    return matches(compiled((pattern,), "the schema's pattern")[0], text)


def _repeated_sentence(text: str) -> str | None:
    normalized = [" ".join(sentence.lower().split()) for sentence in sentences(text)]
    long = [sentence for sentence in normalized if _words(sentence) >= _LEAST_WORDS]
    at_once = next((a for a, b in pairwise(normalized) if a == b and _words(a) >= _LEAST_WORDS), None)
    return at_once or next((sentence for sentence in long if long.count(sentence) >= _MOST_TIMES), None)


def _words(sentence: str) -> int:
    return len(re.findall(r"[\u3400-\u9fff]|[^\W_]+", sentence))
