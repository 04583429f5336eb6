"""Units after a number: which words are units, and which units are the same."""

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
_SYMBOLS = {form: unit for unit, forms in _FORMS.items() for form in forms.split()} | {
    "miles per hour": "mph",
    "per cent": "%",
}
_OTHER_UNITS = "day week month year cent euro rupee newton joule watt volt unit"
MEASURE = "|".join(
    sorted(
        {
            *(unit for unit in _FORMS if unit.isalpha() and len(unit) > 1),
            *(f"{form}s?" for form in [*_SYMBOLS, *_OTHER_UNITS.split(), "inches"]),
        },
        key=len,
        reverse=True,
    )
)
"""A pattern of the units that may follow a number without ``\\text{}``."""


def _set_of(words: str) -> frozenset[str]:
    return frozenset(words.split())


_NOT_UNITS = _set_of(
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
"""Words that change the value of a number, or that do not occur in units."""
_BEFORE = _set_of(
    """
    not no neither nor never more less fewer greater least most than over under above below half twice double triple
    except maybe perhaps either log
    """
)
"""Words before a number that change its value or make it a bound."""
_AFTER = _set_of(
    """
    squared cubed dozen factorial wrong incorrect false not half halves quarter hundred thousand million billion
    trillion lakh crore k tenth hundredth or
    """
)
"""Words after a number that change its value."""
_LETTERS = _set_of("m g s h l L C F K V W N J a")
"""Letters next to a number that are units or the article, not variables."""
_POWERED = {"squared": "2", "cubed": "3"}
_POWERS = {"square": 2, "sq": 2, "cubic": 3}


def unit_of(words: str, power: str = "") -> str | None:
    """Return the unit that ``words`` after a number denote, in one spelling.

    The result is empty for "units", and None if the words do not denote a unit. ``power`` is the exponent after them.
    """
    parts = words.casefold().replace("-", " ").split()
    if (
        not 0 < len(parts) <= 4
        or any(map(_is_not_unit, parts[:-1] if "per" in parts[1:-1] else parts))
        or not all(part.isalpha() for part in parts)
    ):
        return None
    if len(parts[0]) == 1 and parts[0] not in _FORMS:
        return None
    if parts[0] in _POWERS and len(parts) > 1:
        power, parts = str(_POWERS[parts[0]]), parts[1:]
    if "per" in parts[1:-1] and parts != ["miles", "per", "hour"]:
        return _rate(parts, power)
    name = _singular(" ".join(parts))
    if name == "unit":
        return ""
    return _SYMBOLS.get(name, name) + (f"^{power}" if power else "")


def _rate(parts: list[str], power: str) -> str | None:
    """Return a quotient of two units; ``power`` is the exponent of the denominator."""
    index = parts.index("per")
    over, under = " ".join(parts[:index]), parts[index + 1 :]
    if under[-1] in _POWERED and len(under) > 1 and not power:
        power, under = _POWERED[under[-1]], under[:-1]
    names = [_singular(over), _singular(" ".join(under))]
    if any(name not in _SYMBOLS and name not in _FORMS and f" {name} " not in f" {_OTHER_UNITS} " for name in names):
        return None
    symbols = [_SYMBOLS.get(name, name) for name in names]
    return "mph" if symbols == ["mi", "h"] and not power else "/".join(symbols) + (f"^{power}" if power else "")


def _singular(words: str) -> str:
    if words in _SYMBOLS or words in _FORMS:
        return words
    return words[:-1] if len(words) > 3 and words.endswith("s") and not words.endswith("ss") else words


def _is_not_unit(word: str) -> bool:
    return word in _NOT_UNITS or word.removesuffix("s") in _NOT_UNITS or word.endswith("teen")


def changes_value(before: str, after: str) -> bool:
    """Return whether words around a number change its value, such as "not", "dozen" or a variable ``x``."""
    words_before, words_after = (re.findall(r"[^\W\d_]+", text.casefold()) for text in (before, after))
    adjacent = [*re.findall(r"(?:^|\W)([^\W\d_])\s?$", before), *re.findall(r"^\s?([^\W\d_])(?!\w)", after)]
    return (
        any(word in _BEFORE for word in words_before)
        or any(word in _AFTER or word.removesuffix("s") in _AFTER for word in words_after)
        or any(letter not in _LETTERS for letter in adjacent)
    )
