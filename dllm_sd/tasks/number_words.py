"""Whole numbers written as English words."""

_UNITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_TEENS = ("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
_SMALL = {word: value for value, word in enumerate(_UNITS + _TEENS)}
_ROUND = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_TENS = {word: 10 * value for value, word in enumerate(_ROUND, 2)}
_GROUPS = {"thousand": 10**3, "million": 10**6, "billion": 10**9}


def number_of_words(text: str) -> int | None:
    """Return the number that words express, such as "minus twenty-one"; None for anything else."""
    words = text.casefold().replace("-", " ").split()
    if len(words) > 20:
        return None
    sign = -1 if words[:1] in (["minus"], ["negative"]) else 1
    value = _grouped(words[1:] if sign < 0 else words)
    return None if value is None else sign * value


def _grouped(words: list[str]) -> int | None:
    """Return the value of groups of up to three digits, whose powers of a thousand decrease."""
    total, bound, rest = 0, 10**12, words
    for name, power in reversed(_GROUPS.items()):
        if name in rest:
            index = rest.index(name)
            value = _below_thousand(rest[:index])
            if not value or power >= bound:
                return None
            total, bound, rest = total + value * power, power, rest[index + 1 :]
    if not rest:
        return total if words else None
    rest = rest[1:] if total and rest[0] == "and" else rest
    value = _below_thousand(rest)
    return None if value is None or (total and not value) else total + value


def _below_thousand(words: list[str]) -> int | None:
    if len(words) >= 2 and words[1] == "hundred":
        hundreds, rest = _SMALL.get(words[0], 0), words[2:]
        if not 1 <= hundreds <= 9:
            return None
        rest = rest[1:] if rest[:1] == ["and"] and rest[1:] else rest
        value = _below_hundred(rest) if rest else 0
        return None if value is None or (rest and not value) else 100 * hundreds + value
    return _below_hundred(words)


def _below_hundred(words: list[str]) -> int | None:
    if len(words) == 1:
        return _SMALL.get(words[0], _TENS.get(words[0]))
    if len(words) == 2 and words[0] in _TENS and 1 <= _SMALL.get(words[1], 0) <= 9:
        return _TENS[words[0]] + _SMALL[words[1]]
    return None
