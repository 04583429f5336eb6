"""The claims of the papers as data (`claims.yaml`): what is compared, on which model, and what decides.

A claim is an experiment of several rows, each a method with overrides. Every row has the same number of settings to be
tuned on, the same number of generated tokens, and the same fresh seeds. `Statement` says what must hold for
"reproduced".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from dllm_sd.errors import InputError
from dllm_sd.files.plain_yaml import read_yaml

CLAIMS = Path(__file__).with_name("claims.yaml")
BASE = "base"
"""The row of the model before training."""
T = TypeVar("T")


@dataclass(frozen=True)
class Base:
    """A model on which claims are tested: a shipped one, or one that a recipe trains once and keeps in the folder."""

    about: str
    """What it is, and what makes it fit for the claims that use it."""
    path: str | None = None
    """The name of a shipped model, or ``LAB/NAME`` for a folder that a user makes; a base without it has a recipe."""
    config: str | None = None
    """The config that trains it."""
    data: str | None = None
    """The maker of its data, of `tools.lab.data.MAKERS`; what it writes is in LAB/data/NAME."""
    set: tuple[str, ...] = ()
    """Overrides of the config; ``LAB`` is the laboratory's folder, ``LAB/bases/NAME`` another base."""
    needs: tuple[str, ...] = ()
    """Bases that must be there before."""


@dataclass(frozen=True)
class Row:
    """A method with overrides, as one row of a claim's table."""

    method: str
    set: tuple[str, ...] = ()
    """Overrides of every run of the row."""
    variants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The second factor of the tuning grid: overrides by name; empty takes that of the claim."""
    share: float = 1.0
    """Of the claim's generated tokens, the share that this row may use."""
    updates_like: str | None = None
    """The row whose number of updates this one takes, whatever it generates; for shorter and growing rollouts."""
    rates: tuple[float, ...] = ()
    """Learning rates of the tuning grid; empty takes those of the claim."""
    like: str | None = None
    """The row whose best setting this one takes without tuning of its own; for controls that change one thing."""
    gated: bool = True
    """Whether a probe that is not promising keeps the row from being trained."""


@dataclass(frozen=True)
class Comparison:
    """A value of one row is larger than that of another: the 95 % interval of the difference lies above -margin."""

    row: str
    against: str
    value: str = "accuracy"
    """A value of a run: ``accuracy``, ``entropy``, ``length``, ``core_seconds``, ``elsewhere/NAME``, ..."""
    margin: float = 0.0
    """In the units of the value (points of accuracy); above 0 the row may be so much smaller ("not below")."""


@dataclass(frozen=True)
class Statement:
    """One sentence of a paper in miniature; it is reproduced if all comparisons hold."""

    says: str
    holds: tuple[Comparison, ...]

    @property
    def rows(self) -> set[str]:
        """The trained rows that it speaks of."""
        return {row for one in self.holds for row in (one.row, one.against)} - {BASE}


@dataclass(frozen=True)
class Claim:
    """An experiment: rows on one model and task, and the statements that they decide."""

    title: str
    source: str
    """The paper, and where in it."""
    base: str
    config: str
    rows: Mapping[str, Row]
    statements: tuple[Statement, ...]
    tokens: int
    """Tokens that the rollouts of a run of share 1 may generate; rows without rollouts take the first row's updates."""
    set: tuple[str, ...] = ()
    """Overrides of every run: task, decoding, optimizer."""
    rollouts: tuple[str, ...] = ()
    """Overrides of the rows that make rollouts."""
    needs: tuple[str, ...] = ()
    """Further bases, for teachers and peers."""
    rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4)
    """Learning rates of the tuning grid."""
    variants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The second factor of the tuning grid for rows that name none."""
    tuning: float = 1.0
    """Largest share of the tokens that a run of the tuning may use; below 1, shorter runs choose the setting."""
    seeds: tuple[int, ...] = (11, 12, 13)
    """Fresh seeds of the final runs; tuning has seed 1."""
    dev: int = 512
    test: int = 2048
    probe: int = 64
    """Problems for tuning, for the final runs, and for the probe; a claim with 0 problems for the probe has none."""
    elsewhere: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Problems outside of the training domain: overrides of task and decoding by name."""
    critic: bool = False
    """Whether a server that corrects every rollout without fault runs along, for which ``CRITIC`` stands."""

    def settings(self, name: str) -> list["Setting"]:
        """The grid of a row, of which tuning takes the best; none of a row that takes another one's setting."""
        row = self.rows[name]
        if row.like is not None:
            return []
        rates, variants = row.rates or self.rates, row.variants or self.variants or {"": ()}
        return [Setting(rate, variant, tuple(texts)) for rate, (variant, texts) in product(rates, variants.items())]


@dataclass(frozen=True)
class Setting:
    """One point of the tuning grid."""

    rate: float
    variant: str
    set: tuple[str, ...] = ()

    @property
    def overrides(self) -> list[str]:
        """The setting as overrides of a config."""
        return [*self.set, f"optim.lr={self.rate}"]

    @property
    def name(self) -> str:
        """The setting in a word or two, for tables and folders."""
        return " ".join(filter(None, (f"lr {self.rate:g}", self.variant)))


@dataclass(frozen=True)
class Laboratory:
    """All bases and claims, in the order in which they are run: the most important first."""

    bases: Mapping[str, Base]
    claims: Mapping[str, Claim]


def read_laboratory(path: Path = CLAIMS) -> Laboratory:
    """The bases and claims of a file.

    Raises:
        InputError: naming what the file has too much or too little of.
    """
    tree = read_yaml(path, path.name)
    bases = {name: _build(Base, entry, f"bases.{name}") for name, entry in tree["bases"].items()}
    baselines = {name: _row(entry, f"baselines.{name}") for name, entry in tree.get("baselines", {}).items()}
    claims = {name: _claim(entry, baselines, f"claims.{name}") for name, entry in tree["claims"].items()}
    for name, claim in claims.items():
        _check(name, claim, bases)
    return Laboratory(bases, claims)


def _claim(entry: Mapping[str, Any], baselines: Mapping[str, Row], where: str) -> Claim:
    """A claim of the file, with the baselines that it lists as its last rows."""
    entry = dict(entry)
    rows = {name: _row(row, f"{where}.rows.{name}") for name, row in entry["rows"].items()}
    listed = entry.pop("baselines", [])
    if not isinstance(listed, list):
        raise InputError(f"{where}.baselines is {listed!r}; give a list, such as [sft]")
    for name in listed:
        if name not in baselines:
            raise InputError(f"{where}.baselines has {name!r}, which is none of {', '.join(baselines)}; correct it")
        if name in rows:
            raise InputError(f"{where} has {name!r} both among its rows and its baselines; leave out one of them")
        rows[name] = baselines[name]
    statements = tuple(
        Statement(
            one["says"], tuple(_build(Comparison, each, f"{where}.statements.{i}.holds") for each in one["holds"])
        )
        for i, one in enumerate(entry["statements"])
    )
    return _build(Claim, {**entry, "rows": rows, "statements": statements}, where)


def _row(entry: str | Mapping[str, Any], where: str) -> Row:
    return _build(Row, {"method": entry} if isinstance(entry, str) else entry, where)


def _build(cls: type[T], entry: Mapping[str, Any], where: str) -> T:
    known = {f.name for f in fields(cls)}  # pyright: ignore[reportArgumentType]
    if unknown := sorted(set(entry) - known):
        raise InputError(f"{where} has {unknown[0]!r}, which is none of {', '.join(sorted(known))}; correct it")
    try:
        return cls(**{key: _frozen(value) for key, value in entry.items()})
    except TypeError as error:
        raise InputError(f"{where} is not complete ({error}); add what is missing") from error


def _frozen(value: Any) -> Any:
    """Lists as tuples, also those in a mapping."""
    if isinstance(value, Mapping):
        return {key: _frozen(inner) for key, inner in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _check(name: str, claim: Claim, bases: Mapping[str, Base]) -> None:
    """Refuse names of rows and bases that nothing has."""
    for base in (claim.base, *claim.needs):
        if base not in bases:
            raise InputError(f"claims.{name} needs the base {base!r}, which is not among bases; add it or correct it")
    named = {row for statement in claim.statements for row in statement.rows}
    named |= {other for row in claim.rows.values() for other in (row.like, row.updates_like) if other is not None}
    if missing := sorted(named - set(claim.rows)):
        raise InputError(f"claims.{name} speaks of the row {missing[0]!r}, which is not among its rows; correct it")


def in_order(names: Sequence[str], laboratory: Laboratory) -> dict[str, Claim]:
    """The claims that were asked for, in that order; all if none were.

    Raises:
        InputError: if one is not there.
    """
    if unknown := [name for name in names if name not in laboratory.claims]:
        raise InputError(f"there is no claim {unknown[0]!r}; claims are {', '.join(laboratory.claims)}")
    return {name: laboratory.claims[name] for name in names or laboratory.claims}
