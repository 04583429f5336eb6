"""Stories that word problems tell: how they start, go on and end, and how each step is worked out."""

from dataclasses import dataclass
from typing import Literal

Operator = Literal["+", "-", "*", "/"]

NAMES = (
    *("Ada", "Ben", "Carla", "Dan", "Emma", "Finn", "Grace", "Hugo", "Ivy", "Jack", "Kim", "Leo", "Mia", "Noah"),
    *("Olga", "Paul", "Rosa", "Sam", "Tina", "Vera"),
)


@dataclass(frozen=True)
class Move:
    """One step of a story. The value so far and the number ``{n}`` make the next value by ``operator``."""

    operator: Operator
    told: str
    """The sentence of the question."""
    worked: str
    """The sentence of the solution, with the ``{equation}``."""


@dataclass(frozen=True)
class Story:
    """A story about ``{things}``, which ``{name}`` and ``{other}`` live through."""

    title: str
    things: tuple[str, ...]
    start: str
    """Tells the first number, ``{n}``."""
    groups: Move
    """Starts the story with ``{m}`` groups of ``{n}`` instead, which is a step by itself."""
    middle: tuple[Move, ...]
    """Steps after which the story can go on, or end with ``asked``."""
    asked: str
    """The question about the value so far."""
    last: tuple[Move, ...]
    """Steps that end a story with a question of their own."""


STORIES = (
    Story(
        "collection",
        ("marbles", "stamps", "coins", "shells", "cards", "stickers", "buttons", "beads", "pens", "stones"),
        "{name} has {n} {things}.",
        Move("*", "{name} has {m} boxes with {n} {things} in each.", "The boxes hold {equation} {things}."),
        (
            Move("+", "Then {name} finds {n} more.", "With those there are {equation} {things}."),
            Move("+", "{other} brings {name} {n} more {things}.", "That makes {equation} {things}."),
            Move("-", "Then {name} gives {n} of them to {other}.", "{name} keeps {equation} {things}."),
            Move("-", "On the way home {name} loses {n} {things}.", "After that there are {equation} {things}."),
        ),
        "How many {things} does {name} have now?",
        (
            Move(
                "/",
                "{name} shares all the {things} equally among {n} friends. How many {things} does each friend get?",
                "Each friend gets {equation} {things}.",
            ),
            Move(
                "*",
                "{other} has {n} times as many {things} as {name} has now. How many {things} does {other} have?",
                "{other} has {equation} {things}.",
            ),
        ),
    ),
    Story(
        "bill",
        ("kites", "books", "caps", "lamps", "plants", "mugs", "balls", "brushes"),
        "{name} buys {things} for {n} dollars.",
        Move("*", "{name} buys {m} {things} for {n} dollars each.", "The {things} cost {equation} dollars."),
        (
            Move("+", "A bag to carry them costs {n} dollars more.", "With the bag it is {equation} dollars."),
            Move("+", "{name} also buys a meal for {n} dollars.", "With the meal it is {equation} dollars."),
            Move("-", "A coupon takes {n} dollars off the bill.", "With the coupon it is {equation} dollars."),
            Move("-", "{other} pays {n} dollars of the bill.", "The rest of the bill is {equation} dollars."),
        ),
        "How many dollars does {name} have to pay?",
        (
            Move(
                "/",
                "{n} friends split this bill equally. How many dollars does each of them pay?",
                "Each of them pays {equation} dollars.",
            ),
            Move(
                "-",
                "{other} spends {n} dollars less than that. How many dollars does {other} spend?",
                "{other} spends {equation} dollars.",
            ),
        ),
    ),
    Story(
        "trip",
        ("miles", "blocks", "laps"),
        "{name} walks {n} {things} on Monday.",
        Move("*", "For {m} days {name} walks {n} {things} a day.", "In these days {name} walks {equation} {things}."),
        (
            Move("+", "The next day {name} walks {n} {things}.", "With that day it is {equation} {things}."),
            Move("+", "In the evening {name} walks {n} {things} more.", "With the evening it is {equation} {things}."),
        ),
        "How many {things} does {name} walk in all?",
        (
            Move(
                "-",
                "{other} walks {n} {things} less in that time. How many {things} does {other} walk?",
                "{other} walks {equation} {things}.",
            ),
            Move(
                "*",
                "{other} walks {n} times as far in that time. How many {things} does {other} walk?",
                "{other} walks {equation} {things}.",
            ),
            Move(
                "/",
                "{other} needs {n} days for the same way, and walks equally far each day. "
                "How many {things} does {other} walk in a day?",
                "In a day {other} walks {equation} {things}.",
            ),
        ),
    ),
    Story(
        "bakery",
        ("rolls", "buns", "cakes", "tarts", "pies", "muffins"),
        "A baker makes {n} {things}.",
        Move("*", "A baker fills {m} trays with {n} {things} each.", "The trays hold {equation} {things}."),
        (
            Move("+", "Later the baker makes {n} more.", "Then there are {equation} {things}."),
            Move("-", "{name} buys {n} of the {things}.", "After that {equation} {things} are left."),
            Move("-", "{n} of the {things} burn and are thrown away.", "That leaves {equation} {things}."),
        ),
        "How many {things} does the baker have now?",
        (
            Move(
                "/",
                "The {things} are packed in bags of {n}. How many bags are filled?",
                "They fill {equation} bags.",
            ),
            Move(
                "*",
                "All the {things} are sold for {n} dollars each. How many dollars does the baker earn?",
                "The baker earns {equation} dollars.",
            ),
        ),
    ),
    Story(
        "crowd",
        ("children", "guests", "players", "dancers", "singers"),
        "There are {n} {things} in a hall.",
        Move("*", "{m} vans bring {n} {things} each to a hall.", "The vans bring {equation} {things}."),
        (
            Move("+", "Then {n} more {things} come in.", "Now there are {equation} {things}."),
            Move("-", "After a while {n} of the {things} go home.", "{equation} {things} stay."),
        ),
        "How many {things} are in the hall now?",
        (
            Move(
                "/",
                "They form {n} groups of equal size. How many {things} are in each group?",
                "Each group has {equation} {things}.",
            ),
            Move(
                "*",
                "Each of them gets {n} apples. How many apples do they get together?",
                "Together they get {equation} apples.",
            ),
        ),
    ),
)
