"""
English numbers in words: "It costs $9.99." -> "It costs nine dollars and ninety nine cents."

espeak-ng reads digits too, but phonemizer cuts a text at punctuation first, and its versions
disagree on full stops and commas inside a number.
"""

from __future__ import annotations

import re
from collections.abc import Callable


# Singular and plural of the currency and of its hundredth.
_CURRENCIES = {
    "$": ("dollar", "dollars", "cent", "cents"),
    "€": ("euro", "euros", "cent", "cents"),
    "£": ("pound", "pounds", "penny", "pence"),
    "₹": ("rupee", "rupees", "paisa", "paise"),
    "¥": ("yen", "yen"),
    "₩": ("won", "won"),
}
_CODES = {"USD": "$", "EUR": "€", "GBP": "£", "INR": "₹", "JPY": "¥", "KRW": "₩"}
_COUNTRIES = {
    "US": "US",
    "A": "Australian",
    "AU": "Australian",
    "C": "Canadian",
    "CA": "Canadian",
    "HK": "Hong Kong",
    "NZ": "New Zealand",
}
_SCALES = {"k": "thousand", "m": "million", "mn": "million", "b": "billion", "bn": "billion", "tn": "trillion"}

# Symbols that are words or names as well ("in", "A", "K") are left out. Plurals end in "s", but for
# `_PLURALS`.
_UNITS = {
    **{"%": "percent", "°C": "degree Celsius", "°F": "degree Fahrenheit", "°": "degree", "¢": "cent"},
    **{"km": "kilometer", "m": "meter", "cm": "centimeter", "mm": "millimeter", "nm": "nanometer"},
    **{"km²": "square kilometer", "m²": "square meter", "m³": "cubic meter", "ha": "hectare"},
    **{"mi": "mile", "yd": "yard", "ft": "foot", "sq ft": "square foot", "sq mi": "square mile"},
    **{"kg": "kilogram", "g": "gram", "mg": "milligram", "lb": "pound", "lbs": "pound", "oz": "ounce"},
    **{"L": "liter", "l": "liter", "mL": "milliliter", "ml": "milliliter", "gal": "gallon"},
    **{"h": "hour", "hr": "hour", "hrs": "hour", "min": "minute", "mins": "minute", "s": "second", "sec": "second"},
    **{"ms": "millisecond", "mph": "mile per hour", "kph": "kilometer per hour"},
    **{"Hz": "hertz", "kHz": "kilohertz", "MHz": "megahertz", "GHz": "gigahertz", "dB": "decibel"},
    **{"V": "volt", "W": "watt", "kW": "kilowatt", "MW": "megawatt", "GW": "gigawatt", "kWh": "kilowatt hour"},
    **{"mA": "milliamp", "mAh": "milliamp hour", "kcal": "kilocalorie", "kJ": "kilojoule"},
    **{"KB": "kilobyte", "kB": "kilobyte", "MB": "megabyte", "GB": "gigabyte", "TB": "terabyte", "px": "pixel"},
    **{"kbps": "kilobit per second", "Mbps": "megabit per second", "Gbps": "gigabit per second"},
}
_PLURALS = {"foot": "feet", "percent": "percent", "hertz": "hertz", "degree ": "degrees ", " per ": "s per "}

_MONTHS = ["January", "February", "March", "April", "May", "June", "July"]
_MONTHS += ["August", "September", "October", "November", "December"]

_THOUSANDS = "[0-9]{1,3}(?:,[0-9]{2,3})*,[0-9]{3}(?![0-9])"
_NUMBER = rf"(?:(?:{_THOUSANDS}|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
_CENTURY = "(?:1[1-9]|20)"
_YEAR = f"{_CENTURY}[0-9][0-9]"
_DASH = r"\s?[-–—]\s?"
# Not in the middle of a longer number.
_START, _END = r"(?<![0-9])(?<![0-9][.,])", r"(?![0-9])(?![.,][0-9])"
_ARTICLE = r"(?P<article>\b[Aa]n?\s)?"
_MONTH = rf"\b(?P<month>{'|'.join(_MONTHS)}|(?:Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)\b\.?)"
_SCALE = r"(?P<scale>[ -]?(?:thousand|million|billion|trillion)\b|(?:[kKmMbB]|[bmt]n)\b)?"
_SYMBOL, _UNIT = ("|".join(map(re.escape, sorted(names, key=len, reverse=True))) for names in (_CURRENCIES, _UNITS))
_YEAR_CONTEXT = r"(?P<context>\b(?i:in|since|by|until|till|from|before|after|during|circa|year|early|late|mid)[\s-])?"
# Four digits before these are not a year, nor before plurals.
_COUNTED = r"(?P<counted>(?=\s(?:people|men|women|children|feet|million|billion|(?!was|is|has)[a-z]+s\b)))?"


def spell_numbers(text: str) -> str:
    """
    Write the numbers of an English text in words, as they are read in American English.

    These are whole numbers, decimals, ordinals, prices, units, years, dates, times, ranges and
    fractions. A text without the digits 0 to 9 stays as it is; afterwards no text has any.

    Args:
        text: English text.

    Returns:
        The text in words.

    Raises:
        ImportError: `text` has digits, and the `[tts]` extra is not installed.
    """
    if re.search("[0-9]", text):
        for pattern, spell in _RULES:
            text = pattern.sub(spell, text)
    return text


def _words(number: int, form: str = "cardinal") -> str:
    try:
        from num2words import num2words
    except ImportError as error:
        raise ImportError("Numbers in English texts need num2words: `pip install num2words`.") from error
    # "one thousand, two hundred and thirty-four" is British; a comma would be a pause.
    return re.sub(r",| and\b", "", num2words(number, to=form)).replace("-", " ")


def _digits(number: str) -> str:
    return " ".join(_words(int(digit)) for digit in number)


def _number(number: str) -> str:
    """Words of "1,234", "0.5", or "007"."""
    whole, point, decimals = number.replace(",", "").partition(".")
    is_code = (whole.startswith("0") and len(whole) > 1) or len(whole) > 15
    spelled = _digits(whole) if is_code else _words(int(whole)) if whole else ""
    return f"{spelled} point {_digits(decimals)}".strip() if point else spelled


def _range(low: str, high: str | None) -> str:
    return f"{_number(low)} to {_number(high)}" if high else _number(low)


def _plural(name: str) -> str:
    return next((name.replace(one, many) for one, many in _PLURALS.items() if one in name), f"{name}s")


def _price(match: re.Match[str]) -> str:
    groups = match.groupdict("")
    low, high, scale, article = groups["low"], groups["high"], groups["scale"].strip(" -"), groups["article"]
    one, many, *hundredth = _CURRENCIES[_CODES.get(groups["symbol"], groups["symbol"])]
    if country := groups.get("country"):
        one, many = f"{_COUNTRIES[country]} {one}", f"{_COUNTRIES[country]} {many}"
    whole, _, cents = low.replace(",", "").partition(".")
    # "a five dollar bill", but "five dollars"
    if scale or high or len(cents) != 2 or not hundredth:
        scale = f" {_SCALES.get(scale.lower(), scale)}" if scale else ""
        spelled = [f"{_range(low, high)}{scale} {one if article or (low == '1' and not high and not scale) else many}"]
    else:
        spelled = [f"{_number(whole)} {one if article or whole == '1' else many}"] if whole.strip("0") else []
        if int(cents):
            spelled += [f"{_words(int(cents))} {hundredth[0 if article or int(cents) == 1 else 1]}"]
    per = groups.get("per")
    return (
        article
        + ("minus " if groups["sign"] else "")
        + (" and ".join(spelled) or f"zero {many}")
        + (f" per {_UNITS.get(per, per)}" if per else "")
    )


def _measure(match: re.Match[str]) -> str:
    unit, per, article = _UNITS[match["unit"]], match["per"], match["article"] or ""
    is_one = article or match["gap"] == "-" or (match["low"] == "1" and not match["high"])
    name = unit if is_one else _plural(unit)
    return f"{article}{_range(match['low'], match['high'])} {name}{f' per {_UNITS[per]}' if per else ''}"


def _date(month: str, day: str, year: str | None) -> str:
    if not 1 <= int(day) <= 31 or (month.isdigit() and not 1 <= int(month) <= 12):
        parts = (month, day, *([year] if year else []))
        return " ".join(_number(part) if part.isdigit() else part for part in parts)
    name = _MONTHS[int(month) - 1] if month.isdigit() else next(name for name in _MONTHS if name[:3] == month[:3])
    return f"{name} {_words(int(day), 'ordinal')}" + (f", {_words(int(year), 'year')}" if year else "")


def _time(match: re.Match[str]) -> str:
    parts = [_number(match["hour"])]
    for part in filter(None, (match["minute"], match["second"])):
        parts.append(f"oh {_words(int(part))}" if part[0] == "0" else _words(int(part)))
    if match["minute"] == "00" and not match["second"]:
        parts[1:] = [] if match["half"] else ["o'clock"]
    return " ".join(parts) + (f" {match['half'].strip()}" if match["half"] else "")


def _decade(match: re.Match[str]) -> str:
    *century, decade = _words(int(match[1]), "year").split()
    return " ".join([*century, f"{decade.removesuffix('y')}ies" if decade.endswith("y") else f"{decade}s"])


def _year(match: re.Match[str]) -> str:
    is_count = match["counted"] is not None and not match["context"]
    return (match["context"] or "") + _words(int(match["year"]), "cardinal" if is_count else "year")


def _fraction(match: re.Match[str]) -> str:
    top, bottom = int(match["top"]), int(match["bottom"])
    whole = f"{_number(match['whole'])} and " if match["whole"] else ""
    if not 0 < top < bottom or (top, bottom) == (9, 11):  # 24/7, 9/11
        return f"{whole}{_number(match['top'])} {_number(match['bottom'])}"
    if bottom >= 10 and bottom not in (16, 32, 64, 100):
        return f"{whole}{_words(top)} out of {_words(bottom)}"
    part = {2: "half", 4: "quarter"}.get(bottom, _words(bottom, "ordinal"))
    count = "a" if whole and top == 1 else _words(top)
    return f"{whole}{count} {part if top == 1 else f'{part}s'}"


def _plain(match: re.Match[str]) -> str:
    """Any other number, apart from letters beside it: "MP3", "COVID-19", "3D", "10k"."""
    if match["before"] is None and match["scale"]:
        return f"{_number(match['number'])} {_SCALES[match['scale'].lower()]}"
    before = "" if match["before"] is None else " "
    after = match["scale"] or ""
    return f"{before}{_number(match['number'])}{'' if match['after'] is None and not after else ' '}{after}"


_RULES: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(pattern), spell)
    for pattern, spell in (
        # 2024-05-17, 5/17/2024
        (rf"\b({_YEAR})-([01]?[0-9])-([0-3]?[0-9])\b", lambda match: _date(match[2], match[3], match[1])),
        (rf"\b([01]?[0-9])/([0-3]?[0-9])/({_YEAR})\b", lambda match: _date(match[1], match[2], match[3])),
        # May 5, 2024; 5 May 2024
        (
            rf"{_MONTH}\s(?P<day>[0-3]?[0-9])(?:st|nd|rd|th)?(?:,?\s(?P<year>{_YEAR}))?(?![\w:/%$-])(?![.,][0-9])",
            lambda match: _date(match["month"], match["day"], match["year"]),
        ),
        (
            rf"{_START}\b(?:the\s)?(?P<day>[0-3]?[0-9])(?:st|nd|rd|th)?\s{_MONTH}\b",
            lambda match: f"the {_words(int(match['day']), 'ordinal')} of {match['month']}",
        ),
        # 10:45, 7:05 pm, 5pm
        (
            rf"{_START}(?<![\w:])(?P<hour>[01]?[0-9]|2[0-4]):(?P<minute>[0-5][0-9])(?::(?P<second>[0-5][0-9]))?"
            r"(?![0-9])(?!:[0-9])(?P<half>\s?[AaPp](?:m|M|\.\s?[mM]\.)(?!\w))?",
            _time,
        ),
        (rf"{_START}\b(1?[0-9])(?=[AaPp](?:m|M|\.[mM]\.)(?!\w))", lambda match: f"{_number(match[1])} "),
        # 555-123-4567, 555-1234
        (
            rf"{_START}(?<![\w-])(?:\(([0-9]{{3}})\)\s?|([0-9]{{3}})[-.])?([0-9]{{3}})[-.]([0-9]{{4}})(?![\w-]){_END}",
            lambda match: ", ".join(_digits(part) for part in match.groups() if part),
        ),
        # -$1.2 million, a US$5 bill, $5-10; 5 €, 5 USD
        (
            rf"{_ARTICLE}(?P<sign>(?<![\w-])[-−])?(?:\b(?P<country>{'|'.join(_COUNTRIES)}))?(?P<symbol>{_SYMBOL})\s?"
            rf"(?P<low>{_NUMBER})(?:{_DASH}(?:{_SYMBOL})?(?P<high>{_NUMBER}))?"
            rf"{_SCALE}(?:/(?P<per>{_UNIT}|[a-z]+)\b)?",
            _price,
        ),
        (
            rf"{_START}{_ARTICLE}(?P<sign>(?<![\w-])[-−])?(?P<low>{_NUMBER})(?:{_DASH}(?P<high>{_NUMBER}))?{_SCALE}"
            rf"\s?(?P<symbol>{_SYMBOL}|\b(?:{'|'.join(_CODES)})\b)(?![0-9])",
            _price,
        ),
        (r"(?<![\w)\].,-])[-−](?=\.?[0-9])", "minus "),
        (r"\b[Nn]o\.\s?(?=[0-9])|#(?=[0-9])|№\s?(?=[0-9])", "number "),
        (
            rf"{_START}({_THOUSANDS}|[0-9]{{1,15}})(?:st|nd|rd|th)\b",
            lambda match: _words(int(match[1].replace(",", "")), "ordinal"),
        ),
        # the 1990s, the '80s
        (rf"{_START}\b({_CENTURY}[0-9]0|[2-9]0)'?s\b", _decade),
        # 1 1/2, 3/4
        (
            rf"{_START}(?<![\w/])(?:(?P<whole>[0-9]+)\s)?(?P<top>[0-9]{{1,3}})/(?P<bottom>[0-9]{{1,3}})"
            rf"(?![\w/]){_END}",
            _fraction,
        ),
        # 5 km, a 5 km run, 60 km/h, 5-10%
        (
            rf"{_START}{_ARTICLE}(?P<low>{_NUMBER})(?:{_DASH}(?P<high>{_NUMBER}))?(?P<gap>[ \u00a0\u202f-]?)"
            rf"(?P<unit>{_UNIT})(?:/(?P<per>{_UNIT}))?(?![\w²³/])",
            _measure,
        ),
        # 1914-1918, 1999
        (rf"\b({_YEAR}){_DASH}(?={_YEAR}\b|[0-9][0-9]\b{_END})", lambda match: f"{_words(int(match[1]), 'year')} to "),
        (rf"{_YEAR_CONTEXT}{_START}(?<![\w-])(?P<year>{_YEAR})(?![\w%]){_END}{_COUNTED}", _year),
        # 3.4.1, 10-20, 16:9
        (rf"{_START}[0-9]+(?:\.[0-9]+){{2,}}", lambda match: " point ".join(map(_number, match[0].split(".")))),
        (rf"{_START}({_NUMBER})(?:{_DASH}|:)(?={_NUMBER})", lambda match: f"{_number(match[1])} to "),
        (r"\b911\b", "nine one one"),
        (
            rf"(?P<before>(?<=[A-Za-z])-?)?(?P<number>{_NUMBER})(?P<scale>[kMB]\b)?(?P<after>(?=[^\W0-9_]))?",
            _plain,
        ),
    )
]


__all__ = ["spell_numbers"]
