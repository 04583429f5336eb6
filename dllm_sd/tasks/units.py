"""Units behind a number: which words are one, and which units are the same."""

import re

_FORMS = {
    "cm": "centimeter centimetre",
    "mm": "millimeter millimetre",
    "m": "meter metre",
    "km": "kilometer kilometre",
    "in": "inch inche",
    "ft": "foot feet",
    "yd": "yard",
    "mi": "mile",
    "mg": "milligram",
    "g": "gram",
    "kg": "kilogram",
    "lb": "pound",
    "oz": "ounce",
    "ml": "milliliter millilitre",
    "l": "liter litre",
    "s": "sec second",
    "min": "minute",
    "h": "hr hour",
    "$": "usd dollar",
    "°": "degree deg",
    "%": "percent",
}
_SHORT = {form: unit for unit, forms in _FORMS.items() for form in forms.split()} | {
    "miles per hour": "mph",
    "per cent": "%",
}
_MORE = "day week month year cent euro rupee newton joule watt volt unit"
MEASURE = "|".join(
    sorted(
        {
            *(unit for unit in _FORMS if unit.isalpha() and len(unit) > 1),
            *(f"{form}s?" for form in [*_SHORT, *_MORE.split(), "inches"]),
        },
        key=len,
        reverse=True,
    )
)
"""A pattern of the units that may stand behind a number without ``\\text{}``."""


def _set_of(words: str) -> frozenset[str]:
    return frozenset(words.split())


_NO_UNIT = _set_of(
    """
    a about all almost an approximately at base but by cubed divided dozen each either else equals except exactly
    factorial false few for half hundred if is it least less many maybe million billion trillion thousand minus mod
    modulo more most multiplied negative neither no none nor not of only otherwise over perhaps plus possibly
    quarter raised remainder root roughly several some squared than the then third times to total true undefined
    unless unknown up when where with without wrong right correct incorrect zero one two three four five six seven
    eight nine ten eleven twelve twenty thirty forty fifty sixty seventy eighty ninety lakh crore gross score double
    twice triple pi inverse opposite greater larger bigger smaller fewer higher lower halve tenth hundredth
    thousandth fourth fifth sixth seventh eighth ninth inverse reciprocal negative positive
    """
)
"""Words that change what a number says, or that no unit has."""
_BEFORE = _set_of(
    """
    not no neither nor never more less fewer greater least most than over under above below half twice double triple
    except maybe perhaps either log
    """
)
"""Words before a number that make it another one, or a bound."""
_BEHIND = _set_of(
    """
    squared cubed dozen factorial wrong incorrect false not half halves quarter hundred thousand million billion
    trillion lakh crore k tenth hundredth or
    """
)
"""Words behind a number that do."""
_LETTERS = _set_of("m g s h l L C F K V W N J a")
"""Letters beside a number that are units (or the article) and no names."""
_POWERED = {"squared": "2", "cubed": "3"}
_POWERS = {"square": 2, "sq": 2, "cubic": 3}


def unit_of(words: str, power: str = "") -> str | None:
    """The unit that ``words`` behind a number are, in one form; empty for "units", None where they are no unit.

    ``power`` is the exponent behind them.
    """
    parts = words.casefold().replace("-", " ").split()
    if (
        not 0 < len(parts) <= 4
        or any(map(_is_no_unit, parts[:-1] if "per" in parts[1:-1] else parts))
        or not all(part.isalpha() for part in parts)
    ):
        return None
    if len(parts[0]) == 1 and parts[0] not in _FORMS:
        return None
    if parts[0] in _POWERS and len(parts) > 1:
        power, parts = str(_POWERS[parts[0]]), parts[1:]
    if "per" in parts[1:-1] and parts != ["miles", "per", "hour"]:
        return _rate(parts, power)
    whole = _singular(" ".join(parts))
    if whole == "unit":
        return ""
    return _SHORT.get(whole, whole) + (f"^{power}" if power else "")


def _rate(parts: list[str], power: str) -> str | None:
    """One unit per another; ``power`` is that of the last."""
    place = parts.index("per")
    over, under = " ".join(parts[:place]), parts[place + 1 :]
    if under[-1] in _POWERED and len(under) > 1 and not power:
        power, under = _POWERED[under[-1]], under[:-1]
    names = [_singular(over), _singular(" ".join(under))]
    if any(name not in _SHORT and name not in _FORMS and f" {name} " not in f" {_MORE} " for name in names):
        return None
    short = [_SHORT.get(name, name) for name in names]
    return "mph" if short == ["mi", "h"] and not power else "/".join(short) + (f"^{power}" if power else "")


def _singular(words: str) -> str:
    if words in _SHORT or words in _FORMS:
        return words
    return words[:-1] if len(words) > 3 and words.endswith("s") and not words.endswith("ss") else words


def _is_no_unit(word: str) -> bool:
    return word in _NO_UNIT or word.removesuffix("s") in _NO_UNIT or word.endswith("teen")


def changes_value(before: str, behind: str) -> bool:
    """Whether words around a number say that the value is another one, as "not", "dozen" or a name such as ``x`` do."""
    first, last = (re.findall(r"[^\W\d_]+", text.casefold()) for text in (before, behind))
    near = [*re.findall(r"(?:^|\W)([^\W\d_])\s?$", before), *re.findall(r"^\s?([^\W\d_])(?!\w)", behind)]
    return (
        any(word in _BEFORE for word in first)
        or any(word in _BEHIND or word.removesuffix("s") in _BEHIND for word in last)
        or any(letter not in _LETTERS for letter in near)
    )
