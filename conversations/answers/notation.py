"""Normalises notation: Unicode signs, LaTeX spacing, \\dfrac, $...$, 1,234."""

import re
import unicodedata

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "0123456789+-()n", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋", "0123456789+-", strict=True))
_RAISED = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_LOWERED = re.compile(f"[{''.join(_SUBSCRIPTS)}]+")
_VULGAR = re.compile("[¼½¾⅐-⅞↉]")
# The minus signs, then Unicode signs that LaTeX spells out or that have several forms.
_SIGNS = {
    **dict.fromkeys("−–—‒﹣－﹘‐‑", "-"),
    **{"×": r"\times ", "✕": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "∙": r"\cdot ", "÷": r"\div ", "⁄": "/"},
    **{"π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": "=", "≅": "=", "⩽": r"\le "},
    **{"∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "ø": r"\emptyset ", "Ø": r"\emptyset "},
    **{"±": r"\pm ", "°": r"^\circ ", "∠": r"\angle ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "⩾": r"\ge "},
    **{"∶": ":", "：": ":", "′": "'", "’": "'", "‘": "'", "“": '"', "”": '"', "…": r"\ldots ", "ℝ": r"\mathbb{R}"},
    **{"。": ". ", "、": ", ", "，": ", ", "；": "; ", "℃": r"^\circ C", "℉": r"^\circ F", "⟨": "(", "⟩": ")"},
}
_SIGN = re.compile("[" + re.escape("".join(_SIGNS)) + "]")
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|(\d+(?:\.\d+)?|[A-Za-z]))")
_INVISIBLE = re.compile("[\u200b-\u200f\u2060\ufeff\u00ad\u202a-\u202e]")

_SPACING = re.compile(r"\\(?:[,;:> ]|q?quad(?![A-Za-z])|[ht]space\{[^{}]*\})|~")
_NOTHING = re.compile(
    r"\\(?:!|(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|nolimits|mathstrut|phantom\{[^{}]*\})(?![A-Za-z]))"
)
_TEXT = re.compile(
    r"\\(?:text(?:rm|bf|it|sf|tt|normal)?|mbox|hbox|mathrm|mathbf|mathit|mathsf|boldsymbol|bm|operatorname\*?)\s*\{"
)
_RENAMED = (
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\[dt]binom(?![A-Za-z])"), r"\\binom"),
    (re.compile(r"\\(?:leqslant|leq|le)(?![A-Za-z])"), r"\\le "),
    (re.compile(r"\\(?:geqslant|geq|ge)(?![A-Za-z])"), r"\\ge "),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\neq(?![A-Za-z])"), r"\\ne "),
    (re.compile(r"\\(?:approx|simeq|equiv)(?![A-Za-z])"), "="),
    (re.compile(r"\\(?:varnothing|O)(?![A-Za-z])"), r"\\emptyset "),
    (re.compile(r"\\(?:colon|ratio)(?![A-Za-z])"), ":"),
    (re.compile(r"\\(?:l|r)angle(?![A-Za-z])"), lambda m: "(" if m[0][1] == "l" else ")"),
    (re.compile(r"\\(?:lbrack|rbrack)(?![A-Za-z])"), lambda m: "[" if m[0][1] == "l" else "]"),
    (re.compile(r"\\(?:lbrace|rbrace)(?![A-Za-z])"), lambda m: r"\{" if m[0][1] == "l" else r"\}"),
    (re.compile(r"\\(?:degree|textdegree)(?![A-Za-z])"), r"^\\circ "),
    (re.compile(r"\^\s*\{\s*\\circ\s*\}"), r"^\\circ "),
    (re.compile(r"\\mathbb\s*R(?![A-Za-z])|\\R(?![A-Za-z])"), r"\\mathbb{R}"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*(\d)\s*\{"), r"\\frac{\1}{"),
    (re.compile(r"(\\frac\s*\{[^{}]*\})\s*([0-9A-Za-z])"), r"\1{\2}"),
    (re.compile(r"\\sqrt\s*([0-9A-Za-z])"), r"\\sqrt{\1}"),
    (re.compile(r"\^\s*\{\s*([0-9A-Za-z])\s*\}"), r"^\1"),
    (re.compile(r"_\s*\{\s*([0-9A-Za-z])\s*\}"), r"_\1"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"(?<=[0-9A-Za-z)}])\*\*(?=[0-9A-Za-z({-])"), "^"),
)
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+)(?![\d,/]|\.\d*,)")
_MARKED = re.compile(r"(?<!\\)(?:\*\*|__|`+)")


def unified(text: str) -> str:
    """Text with one sign for each meaning, in LaTeX's spelling; prose is unchanged apart from punctuation."""
    text = _INVISIBLE.sub("", text).replace("\u00a0", " ").replace("\u202f", " ").replace("\u2009", " ")
    text = _VULGAR.sub(lambda m: " " + unicodedata.normalize("NFKC", m[0]), text)
    text = _RAISED.sub(lambda m: "^{" + "".join(_SUPERSCRIPTS[c] for c in m[0]) + "}", text)
    text = _LOWERED.sub(lambda m: "_{" + "".join(_SUBSCRIPTS[c] for c in m[0]) + "}", text)
    text = _ROOT.sub(lambda m: r"\sqrt{" + (m[1] or m[2] or "") + "}", text).replace("√", r"\sqrt")
    text = _SIGN.sub(lambda m: _SIGNS[m[0]], text)
    return unicodedata.normalize("NFKC", text)


def without_marks(text: str) -> str:
    """Text without Markdown's bold and code marks; `2**3` keeps its power."""
    text = re.sub(r"(?<=\d)\*\*(?=\d)", "^", text)
    return _MARKED.sub("", text)


def formula(text: str) -> str:
    """One answer in one spelling: no $, no \\left, no spacing commands, \\text for all text commands."""
    text = unwrapped(unified(text))
    text = re.sub(r"(?<=\d)\\[,!:; ]\s*(?=\d{3}(?!\d))", ",", text)
    text = _NOTHING.sub("", _SPACING.sub(" ", text))
    text = _TEXT.sub(lambda m: r"\text{", text)
    for pattern, replacement in _RENAMED:
        text = pattern.sub(replacement, text)
    return unwrapped(re.sub(r"\s+", " ", text))


def without_thousands(text: str) -> str:
    """1,234,567 and 1 234 567 without their separators."""
    return _THOUSANDS.sub(lambda m: re.sub("[ ,]", "", m[0]), text)


_WRAPPERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))


def unwrapped(text: str) -> str:
    """The text without what surrounds it: spaces, a full stop, dollar signs, \\boxed{...}, {...}."""
    before = None
    while before != text:
        before = text
        text = text.strip().rstrip(",;.").strip() if not text.endswith(("\\,", "\\;")) else text[:-2]
        for opening, closing in _WRAPPERS:
            inner = text[len(opening) : len(text) - len(closing)]
            is_wrapped = text.startswith(opening) and text.endswith(closing) and len(text) > len(opening + closing)
            bare = inner.replace("\\$", "")
            if is_wrapped and opening not in bare and closing not in bare and not inner.endswith("\\"):
                text = inner
        match = re.match(r"(?:\\(?:boxed|fbox)\s*)?\{", text)
        if match and closing_brace(text, match.end() - 1) == len(text) - 1:
            text = text[match.end() : -1]
    return text


def closing_brace(text: str, start: int) -> int:
    """Where the brace that opens at `start` closes; -1 if it does not. \\{ and \\} do not count."""
    depth, i = 0, start
    while i < len(text):
        if text[i] == "\\":
            i += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return i
        i += 1
    return -1


def closing_braces(text: str) -> dict[int, int]:
    """{where a brace opens: where it closes} for all that do, as `closing_brace`, in one pass."""
    opened: list[int] = []
    closes: dict[int, int] = {}
    for brace in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if brace[0] == "{":
            opened.append(brace.start())
        elif brace[0] == "}" and opened:
            closes[opened.pop()] = brace.start()
    return closes


def is_balanced(text: str) -> bool:
    """Whether braces and environments close."""
    plain = re.sub(r"\\[{}\\]", "", text)
    depth = 0
    for character in plain:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth < 0:
            return False
    return depth == 0 and len(re.findall(r"\\begin\s*\{", text)) == len(re.findall(r"\\end\s*\{", text))
