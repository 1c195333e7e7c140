"""Finds the final answer in a model's text.

In this order: <answer>...</answer>, a last line "#### 72", the last \\boxed{} (several joined by "and" are one answer),
"the answer is ..." or 答案是..., and otherwise the last formula, number or end of the last sentence. Each is tried both
with and without the words around it, so that neither an extra word nor a surrounding sentence matters.
"""

import re
from collections.abc import Iterator

from conversations.answers.notation import closing_braces, unified, without_marks
from conversations.answers.units import UNIT_WORD

MAX_TEXT = 20_000  # characters at the end of an answer that are searched
MAX_SENTENCE = 2_000  # characters at the end of a sentence that are searched for formulas
MAX_LINKS = 8  # words such as "is" in the last sentence after which the answer may begin
_FINAL_LINE = re.compile(r"(?:^|\n)[ \t]*####[ \t]*([^\n#][^\n]*)\s*\Z")
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)|\\boxed\s+(?=[^\s{])")
_BETWEEN_BOXES = re.compile(r"(?:\s|[,;.、，]|\$|\\[()\[\]]|and|or|和|或|与|\\text\{\s*(?:and|or)\s*\})*")
_PHRASE = re.compile(
    r"(?:\b(?:answers?|result|solution|final value)\b[^.。:：=\n]{0,40}?(?:\b(?:is|are|be|equals)\b(?:\s*:)?|[:：=])"
    r"|(?:答案|结果|答)[^。：:，,\n]{0,12}?(?:是|为|等于|[:：=])|(?:应选|故选|选择|选)(?:项|[:：])?)\s*",
    re.IGNORECASE,
)
_LINK = re.compile(
    r"(?:\b(?:is|are|was|equals?|be|get|gets|gives?|obtain|have|has|find|choose|pick|in|on|at|to|of|that)\b"
    r"|(?<![\d\s])[:：]|(?<!\d)(?<!\d\s)[:：]|[=≈]|是|为|得到|得|等于|有|选|共)\s*",
    re.IGNORECASE,
)
_SENTENCE = re.compile(
    r"(?<=[。！？])\s*|\n+|(?<=[.!?])\s+(?=[A-Z\u4e00-\u9fff$*]|\\(?:boxed|fbox|[(\[]))|(?<=[.?])\s+(?=\\)"
)
_DELIMITED = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<![\\\d])\$((?:\\.|[^$\\])+?)\$", re.DOTALL)

_LETTERS = (
    re.compile(r"\(([A-J])\)"),
    re.compile(
        r"(?:\b[Oo]ption|\b[Cc]hoice|\b[Aa]nswer|选项|选择|选|答案)[^A-Za-z\n]{0,8}?(?<![A-Za-z0-9])([A-J])(?![A-Za-z0-9_^])"
    ),
    re.compile(r"(?:^|\s)([A-J])[.:)。]?\s*$"),
    re.compile(r"^\(?([A-J])[.:)]\s"),
)

_SEVERAL_LETTERS = re.compile(
    r"(?<![A-Za-z0-9])[A-J]\)?\s*(?:[,、;&和与及]|and\b)\s*(?:and\b)?\s*\(?[A-J](?![A-Za-z0-9_^'])"
)
_PROSE = re.compile(
    r"[A-Za-z]{3,}|[\u4e00-\u9fff]"
    r"|(?<![A-Za-z])(?:so|is|it|we|he|at|to|of|in|on|by|be|as|an|if|my|no|do|go|up|us)(?![A-Za-z])",
    re.IGNORECASE,
)
# The parts of an undelimited formula in a sentence; everything else is prose.
_ATOM = re.compile(
    r"\\begin\{(\w+)\}.*?\\end\{\1\}|\\(?:text|mathrm)\{[^{}]*\}|\\[A-Za-z]+|\\[^A-Za-z\s]"
    r"|\d[\d,]*(?:\.\d+)?(?:[eE][+-]?\d+)?(?:st|nd|rd|th)?\b|\.\d+|\d+|[A-Za-z]?\w*\d\w*(?<![\u4e00-\u9fff])"
    r"|(?<![A-Za-z])(?:sin|cos|tan|log|ln|sqrt|pi|and|or|[ap]\.?m\b\.?|to(?=\s*\d))(?![A-Za-z])"
    rf"|(?:(?<=[\d}})])|(?<=[\d}})]\s))(?:(?:square|cubic|平方|立方) ?)?(?:{UNIT_WORD})"
    r"|(?<![A-Za-z])[a-z]{2}(?=\s*[=^])|(?<![A-Za-z])[A-Z]{2,4}(?=\s*=)"
    r"|(?<![A-Za-z'])[b-zB-HJ-Z](?![A-Za-z'])|(?<![A-Za-z'])[aAI](?=\s*[_^=+*/(<>\-]|\s*$)|(?<=[\d)}+*/^=\-(,])\s*[aA](?![A-Za-z])"
    r"|(?<=\d)(?:[a-z]{1,3})(?![A-Za-z])|[-+*/^_=<>()\[\]{}|!%°:,;'&~$€£¥和或]",
    re.DOTALL,
)


def candidates(text: str) -> list[str]:
    """Possible readings of the final answer, best first; empty if there is none."""
    text = text.rsplit("</think>", 1)[-1].strip()[-MAX_TEXT:]
    tagged = _TAGGED.findall(text)
    if tagged and tagged[-1].strip():
        return _with_widths(tagged[-1].strip())
    final = final_line(text)
    if final:
        return _with_widths(final)
    boxed = last_boxes(text)
    if boxed:
        return [boxed, *_single_run(boxed)]
    text = without_marks(text)
    return list(dict.fromkeys(part for part in _in_prose(text) if part.strip()))


def final_line(text: str) -> str | None:
    """The text after "####" on the last line; a Markdown heading does not count."""
    match = _FINAL_LINE.search(text)
    return match[1].strip() if match else None


def after_phrase(text: str) -> str | None:
    """The rest of the sentence after the last "the answer is" or 答案是."""
    phrase = next(reversed(list(_PHRASE.finditer(text))), None)
    tail = _SENTENCE.split(text[phrase.end() :].lstrip(), 1)[0].strip() if phrase else ""
    return tail or None


def chosen_letter(text: str) -> str | None:
    """The last letter of a choice in a sentence: (B), option B, 选B, or B at the start or end; None for a list of
    letters."""
    if _SEVERAL_LETTERS.search(text):
        return None
    letters = [m for pattern in _LETTERS for m in pattern.finditer(text)]
    return max(letters, key=lambda m: m.end())[1] if letters else None


def _with_widths(text: str) -> list[str]:
    boxed = last_boxes(text)
    return [boxed] if boxed else [text, *_single_run(text)]


def last_boxes(text: str) -> str | None:
    """The content of the last \\boxed; of several with only "and", "or" or a comma between them, all of them."""
    boxes: list[str] = []
    end_before = -1
    closes = closing_braces(text)
    for match in _BOX.finditer(text):
        if match.start() < end_before:
            continue  # a box within a box
        if text[match.end()] == "{":
            if match.end() not in closes:
                continue
            end = closes[match.end()]
            content = text[match.end() + 1 : end]
        else:
            end = match.end()
            content = text[end]
        together = end_before >= 0 and _BETWEEN_BOXES.fullmatch(text[end_before : match.start()])
        boxes = [*boxes, content] if together and content not in boxes else [content]
        end_before = end + 1
    return ", ".join(boxes) if boxes else None


def _in_prose(text: str) -> Iterator[str]:
    if len(text) <= 400 and not _has_prose(text):
        yield text
        computed = text.rsplit(",", 1)[-1]
        if re.match(r"[^A-Za-z=]+=", computed):  # 48 / 2 = 24, 48 + 24 = 72
            yield computed
        return
    tail = after_phrase(text)
    if tail:
        yield from _ends(tail)
        runs = math_runs(tail)
        yield from runs[:1] if runs and tail.lstrip("$\\([ ").startswith(runs[0][:1]) else runs[-1:]
        return
    sentences = [part for part in _SENTENCE.split(text) if part and part.strip()]
    if not sentences:
        return
    yield from _ends(sentences[-1])
    for link in list(_LINK.finditer(sentences[-1]))[-MAX_LINKS:]:
        if _value_begins(link):
            yield from _ends(sentences[-1][link.end() :])
    for sentence in reversed(sentences):
        runs = math_runs(sentence)
        if runs:
            yield runs[-1]
            if sentence.rstrip().endswith(("!", "！")):
                yield runs[-1].removesuffix("!")
            computed = runs[-1].rsplit(",", 1)[-1]
            if re.match(r"[^A-Za-z=]+=", computed):  # 48 / 2 = 24, 48 + 24 = 72
                yield computed
            return


def _ends(text: str) -> Iterator[str]:
    """The text with and without its final punctuation: 5! may be a factorial or a sentence."""
    text = text.strip()
    yield text
    if text.endswith(("!", "！", "?", "？")):
        yield text[:-1]


def _value_begins(link: re.Match[str]) -> bool:
    """Whether the answer may begin after this word or sign: not after "=" in x + y = 10 or xy = 4, which are
    answers."""
    before = link.string[: link.start()].rstrip()
    if link[0].strip() not in ("=", "≈"):
        return True
    run = next(reversed(math_runs(before)), "") if before else ""
    letters_and_signs = re.sub(r"\\text\{[^{}]*\}|\\[A-Za-z]+", " ", run)
    return not (before.endswith(run) and re.search("[A-Za-z]", letters_and_signs))


def _single_run(text: str) -> list[str]:
    """The formula of a text in words, as a list; empty if there are several or none."""
    runs = math_runs(text) if _has_prose(text) else []
    return runs if len(runs) == 1 else []


def _has_prose(text: str) -> bool:
    without = re.sub(r"\\(?:text|mathrm)\{[^{}]*\}|\\[A-Za-z]+", " ", _DELIMITED.sub(" ", text))
    beside = _DELIMITED.search(text) and without.strip()
    return bool(beside or _PROSE.search(without))


def math_runs(sentence: str) -> list[str]:
    """The formulas in a sentence, each as long as it can be: delimited ones, and numbers and expressions in words."""
    sentence = sentence[-MAX_SENTENCE:]
    sentence = _DELIMITED.sub(lambda m: " " + next(g for g in m.groups() if g) + " ", sentence)
    sentence = unified(sentence)
    runs: list[str] = []
    start = end = -1
    for atom in _ATOM.finditer(sentence):
        if start >= 0 and sentence[end : atom.start()].strip() == "":
            end = atom.end()
            continue
        if start >= 0:
            runs.append(sentence[start:end])
        start, end = atom.span()
    if start >= 0:
        runs.append(sentence[start:end])
    trimmed = (_trimmed(run) for run in runs)
    return [run for run in trimmed if re.search(r"\d|\\[A-Za-z]|[A-Za-z]", run)]


def _trimmed(run: str) -> str:
    """The text without commas, connecting words, quotes and unmatched brackets at its ends."""
    before = None
    while before != run:
        before = run
        run = re.sub(r"^(?:[\s,;:=*'&~]|(?:and|or|to)\b|[和或])+|(?:[\s,;:='&~*]|\b(?:and|or|to)|[和或])+$", "", run)
        for opening, closing in ("()", "[]"):
            balance = run.count(opening) + run.count("[" if opening == "(" else "(") - run.count(closing)
            if run.endswith(closing) and balance - run.count("]" if closing == ")" else ")") < 0:
                run = run[:-1]
            elif run.startswith(opening) and balance - run.count("]" if closing == ")" else ")") > 0:
                run = run[1:]
    return run
