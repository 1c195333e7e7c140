"""Writes Chinese numerals as digits, where they are numbers: 三十五 -> 35, 3.5亿 -> 350000000, 三分之二 -> 2/3.

A numeral of several characters is a number wherever it stands, except after 第. A single character is part of too many
words (一起, 一个, 十分): it is a number only where a sentence ends with it as the answer (答案是五。 一共有五个。).
"""

import re
from decimal import Context, Decimal

from conversations.answers.units import UNIT_WORD

_SPELLINGS = ("零〇", "一壹", "二两兩贰貳", "三叁參", "四肆", "五伍", "六陆陸", "七柒", "八捌", "九玖")
_VALUES = {character: value for value, characters in enumerate(_SPELLINGS) for character in characters}
_SMALL = {"十": 10, "拾": 10, "百": 100, "佰": 100, "千": 1000, "仟": 1000}
_LARGE = {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
_EXACT = Context(prec=60)

_DIGITS = "".join(_VALUES)
_ALL = _DIGITS + "".join((*_SMALL, *_LARGE))
_D, _0 = f"[{_DIGITS[2:]}]", "[零〇]"
_TEN = f"{_D}?[十拾]{_D}?"
_HUNDRED = f"{_D}[百佰](?:{_0}{_D}|{_TEN})?"
_THOUSAND = f"{_D}[千仟](?:{_0}?{_TEN}|{_0}{_D}|{_HUNDRED})?"
_SECTION = f"(?:{_THOUSAND}|{_HUNDRED}|{_TEN}|{_D})"  # below 10,000
_MYRIAD = f"{_SECTION}[万萬]"
_INTEGER = re.compile(
    f"(?:(?:{_MYRIAD}|(?:{_MYRIAD}{_0}?)?{_SECTION})[亿億]{_0}?)?(?:{_MYRIAD}{_0}?)?{_SECTION}?"
    f"(?:(?<=[百佰千仟万萬亿億]){_D})?|{_0}"
)
_SPELT = re.compile(f"{_D}[{_DIGITS}]{{2,}}")  # 二〇二六
_SHORT = re.compile(f"[百佰千仟万萬亿億]{_D}")  # the end of 三千五, which is 3,500
_LONGEST = 40  # characters

_WRITTEN = f"[{_ALL}]+(?:[点點][{_ALL}]+)*"
_NUMERAL = re.compile(f"(?P<minus>(?<!正)[负負])?(?P<numeral>{_WRITTEN})")
_FRACTION = re.compile(
    rf"(?P<minus>(?<!正)[负負])?(?:(?P<whole>[{_ALL}]{{1,{_LONGEST}}})又)?"
    rf"(?<![第{_ALL}\d])(?P<lower>[{_ALL}]{{1,{_LONGEST}}}|\d{{1,9}})分之"
    rf"(?P<upper>{_WRITTEN}|\d{{1,9}}(?:\.\d{{1,9}})?)(?![{_ALL}\d])"
)
_PARTS = {"百": 100, "千": 1000, "万": 10**4, "萬": 10**4}  # 百分之, 千分之, 万分之
_OF_THOUSAND = "米克瓦卡帕赫伏焦"  # 五千克 is 5 kg, as 5千克 is, and not 5,000 g
_UNIT = rf"(?:[十百千]?[万萬][亿億]?|[十百千]?[亿億]|[百千](?![{_OF_THOUSAND}分]))"
_COUNT = rf"\d{{1,15}}(?:,\d{{3}})*(?:\.\d{{1,12}})?\s?{_UNIT}"
_MIXED = re.compile(rf"(?<![第\d.,A-Za-z_^])(?:{_COUNT})+(?:\d{{1,8}})?(?![\d{_ALL}]|\.\d|分之)")
_PART = re.compile(rf"([\d,.]+)\s?([{''.join((*_SMALL, *_LARGE))}]*)")

_COUNTERS = (
    "个個只隻本条條张張位名人支枝头頭匹辆輛台件块塊颗顆棵朵把根座间間家层層组組套页頁题題"
    "次遍场場杯瓶碗盒箱包袋双雙对對种種枚"
)
_MEASURES = f"(?:{UNIT_WORD}|[{_COUNTERS}])"
_END = r"""\s*(?:[。．.!！?？,，;；)）}\]】$<*"”]|\Z|\n)"""
# Before a single character that is the answer, and what may follow it.
_ANSWERS = re.compile(
    r"(?:(?:答案|结果|結果|答)[^。：:，,\n]{0,12}?(?:是|为|為|[:：])|等于|等於|[=＝]|\\boxed\{|####|<answer>|\A)"
    r"[\s*$（(“\"]*\Z"
)
_LINKS = re.compile(r"(?:是|(?<!合二)[为為]|剩下|[有共得到剩即约約：:]|\\text\{)[\s*$（(“\"]*\Z")
_AFTER_ANSWER = re.compile(rf"(?:{_MEASURES}(?:(?!的)[一-鿿]){{0,6}})?{_END}")
_AFTER_LINK = re.compile(rf"{_MEASURES}?{_END}")
_NOT_AFTER, _NOT_BEFORE = ("第", "初", "几", "数", "數"), ("几", "分之", "点", "點")
_NEAR = 24  # characters before a single character in which its link stands
_NO_NUMBER = "一壹"  # 一个 and 一天 say "a" more often than 1, and 十分 says "very"


def with_digits(text: str) -> str:
    """The text with the numbers that are Chinese numerals written as digits."""
    if not re.search(f"[{_ALL}]", text):
        return text
    text = _MIXED.sub(lambda m: _sum_of_parts(m[0]), text)
    text = _FRACTION.sub(_fraction, text)
    return _NUMERAL.sub(_numeral, text)


def read_chinese(text: str) -> Decimal | None:
    """The value of a text that is a Chinese numeral and nothing else: 一百零五, 三千五, 三点一四; otherwise None."""
    integer, point, decimals = text.replace("點", "点").partition("点")
    if not integer or len(text) > _LONGEST:
        return None
    if _INTEGER.fullmatch(integer):
        value = _value(integer)
    elif _SPELT.fullmatch(integer) and (point or re.search(_0, integer)):
        value = int("".join(str(_VALUES[character]) for character in integer))
    else:
        return None
    if point and not (decimals and set(decimals) <= set(_DIGITS)):
        return None
    return Decimal(f"{value}.{''.join(str(_VALUES[character]) for character in decimals)}") if point else Decimal(value)


def _value(integer: str) -> int:
    above = section = digit = 0  # above: what is in front of the present section of four digits
    unit = 10
    for character in integer:
        if character in _VALUES:
            digit = _VALUES[character]
        elif character in _SMALL:
            unit = _SMALL[character]
            section, digit = section + (digit or 1) * unit, 0
        else:
            unit = _LARGE[character]
            lower = above % 10**8 if unit == 10**4 else above
            above += (lower + section + digit) * unit - lower
            section = digit = 0
    return above + section + digit * (unit // 10 if _SHORT.fullmatch(integer[-2:]) else 1)


def _numeral(match: re.Match[str]) -> str:
    text, written = match.string, match["numeral"]
    after = text[match.end() : match.end() + 20]
    rest = "千" if written.endswith("千") and after[:1] and after[0] in _OF_THOUSAND else ""
    written, after = written.removesuffix(rest), rest + after
    value = read_chinese(written) if written else None
    before = text[max(0, match.start() - _NEAR) : match.start()]
    if value is None or before.endswith(_NOT_AFTER) or after.startswith(_NOT_BEFORE):
        return match[0]
    is_time = re.search("[点點]", written) and after.startswith(("分", "刻"))
    if is_time or (len(written) == 1 and not _is_answer(before, written, after)):
        return match[0]
    return ("-" if match["minus"] else "") + _shown(value) + rest


def _is_answer(before: str, written: str, after: str) -> bool:
    """Whether a single character is what a sentence ends with as its answer."""
    if written in _NO_NUMBER or (written == "十" and after.startswith("分")):
        return bool((_ANSWERS.search(before) or _LINKS.search(before)) and re.match(_END, after))
    return bool(
        (_ANSWERS.search(before) and _AFTER_ANSWER.match(after)) or (_LINKS.search(before) and _AFTER_LINK.match(after))
    )


def _fraction(match: re.Match[str]) -> str:
    lower = _PARTS.get(match["lower"]) or _either(match["lower"])
    upper, whole = _either(match["upper"]), _either(match["whole"]) if match["whole"] else None
    if not lower or upper is None or (match["whole"] and whole is None):
        return match[0]
    minus, whole = "-" if match["minus"] else "", "" if whole is None else f"{_shown(whole)} "
    if match["lower"] == "百":
        return f"{minus}{whole}{_shown(upper)}%"
    return f"{minus}{whole}{_shown(upper)}/{_shown(Decimal(lower))}"


def _either(text: str) -> Decimal | None:
    return Decimal(text) if text[0].isdecimal() else read_chinese(text)


def _sum_of_parts(text: str) -> str:
    """2万5千 -> 25000, 3万5000 -> 35000, 3万5 -> 35000."""
    total, unit = Decimal(0), Decimal(1)
    for number, units in _PART.findall(text):
        tail = unit / 10 if len(number) == 1 and unit > 1 else Decimal(1)
        unit = Decimal(1)
        for character in units:
            unit *= (_SMALL | _LARGE)[character]
        value = _EXACT.multiply(Decimal(number.replace(",", "")), unit if units else tail)
        total = _EXACT.add(total, value)
    return _shown(total)


def _shown(value: Decimal) -> str:
    """Without an exponent, and without zeros at the end of decimals."""
    digits = format(value, "f")
    return digits.rstrip("0").rstrip(".") if "." in digits else digits
