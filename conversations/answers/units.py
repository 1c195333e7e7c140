"""Units and counters that may follow a number, with their other names."""

import re

# unit -> its other names; letters alone ("m", "s") count only after a number and a space, or in \\text.
_UNITS = {
    "%": ("percent", "per cent", "pct", "percentage", "百分比"),
    "deg": ("degree", "度", r"^\circ"),
    "degC": ("c", "degree celsius", "celsius", "摄氏度", r"^\circ c"),
    "degF": ("f", "degree fahrenheit", "fahrenheit", "华氏度", r"^\circ f"),
    "rad": ("radian", "弧度"),
    "dollar": ("$", "usd", "us dollar", "buck", "美元"),
    "cent": ("¢", "美分"),
    "yuan": ("¥", "rmb", "元", "块", "人民币"),
    "euro": ("€", "eur", "欧元"),
    "pound": ("lb", "磅"),
    "quid": ("£", "gbp", "英镑"),
    "mm": ("millimeter", "millimetre", "毫米"),
    "cm": ("centimeter", "centimetre", "厘米"),
    "dm": ("decimeter", "decimetre", "分米"),
    "m": ("meter", "metre", "米"),
    "km": ("kilometer", "kilometre", "公里", "千米"),
    "inch": ("in", "inche", "英寸"),
    "foot": ("ft", "feet", "英尺"),
    "yard": ("yd", "码"),
    "mile": ("mi", "英里"),
    "mg": ("milligram", "毫克"),
    "g": ("gram", "克"),
    "kg": ("kilogram", "千克", "公斤"),
    "ton": ("tonne", "吨"),
    "oz": ("ounce", "盎司"),
    "ml": ("milliliter", "millilitre", "毫升"),
    "l": ("liter", "litre", "升"),
    "gallon": ("gal", "加仑"),
    "ms": ("millisecond", "毫秒"),
    "s": ("sec", "second", "秒", "秒钟"),
    "min": ("minute", "分", "分钟"),
    "h": ("hr", "hour", "小时"),
    "day": ("天", "日"),
    "week": ("周", "星期"),
    "month": ("月", "个月"),
    "year": ("yr", "年", "岁", "years old", "year old"),
    "am": ("a.m", "a.m."),
    "pm": ("p.m", "p.m."),
    "mph": ("mile per hour",),
    "km/h": ("kmh", "kph", "kilometer per hour", "千米每小时", "公里每小时"),
    "m/s": ("meter per second", "米每秒"),
    "unit": ("单位",),
    "n": ("newton", "牛", "牛顿"),
    "j": ("joule", "焦耳"),
    "w": ("watt", "瓦"),
    "v": ("volt", "伏"),
    "hz": ("hertz", "赫兹"),
    "mol": ("mole", "摩尔"),
}
# As words in a sentence, longest first; without "in", "am" and "pm", which have other meanings there.
_NAMES = sorted({name for unit, names in _UNITS.items() for name in (unit, *names)} - {"in", "am", "pm"}, key=len)
UNIT_WORD = "|".join(
    [rf"(?:{'|'.join(name for name in reversed(_NAMES) if re.fullmatch('[a-z ]{2,}', name))})(?:e?s)?(?![A-Za-z])"]
    + [name for name in reversed(_NAMES) if re.fullmatch("[\u4e00-\u9fff]+", name)]
)
_CANONICAL = {name: unit for unit, names in _UNITS.items() for name in (unit.lower(), *names)}
_POWERS = (
    (re.compile(r"^(?:square|sq\.?|平方)\s*(.+)$"), "^2"),
    (re.compile(r"^(?:cubic|cu\.?|立方)\s*(.+)$"), "^3"),
    (re.compile(r"^(.+?)\s*squared$"), "^2"),
    (re.compile(r"^(.+?)\s*cubed$"), "^3"),
    (re.compile(r"^(.+?)\s*\^\s*\{?2\}?$"), "^2"),
    (re.compile(r"^(.+?)\s*\^\s*\{?3\}?$"), "^3"),
)


def canonical_unit(text: str) -> str:
    """A unit's usual name, without plural: "Square Centimeters" -> "cm^2"; unknown ones ("apples") in lower case."""
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).replace("{", "").replace("}", "")
    text = re.sub(r"\s+", " ", text.replace("\\$", "$").replace("\\%", "%")).strip().rstrip(".").lower()
    for pattern, power in _POWERS:
        match = pattern.match(text)
        if match:
            return canonical_unit(match[1]) + power
    if "/" in text:
        return "/".join(canonical_unit(part) for part in text.split("/"))
    singular = text[:-1] if len(text) > 2 and text.endswith("s") else text
    return _CANONICAL.get(text) or _CANONICAL.get(singular) or singular


def is_known_unit(text: str) -> bool:
    """Whether it is a unit of the list, or a power or quotient of such units."""
    base = re.sub(r"\^[23]$", "", canonical_unit(text))
    return all(re.sub(r"\^[23]$", "", part) in _UNITS for part in base.split("/")) or base in _UNITS
