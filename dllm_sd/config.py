"""The configuration: a dataclass schema, YAML in, overrides by dotted keys, every mistake named before anything loads.

Parts (of a method, a task) are chosen by `name` from the tables beside them; their fields are the keys. Anything left
out of a method keeps the value of the named method's row.
"""

import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dllm_sd.errors import InputError, on_one_line, shown
from dllm_sd.method import Method
from dllm_sd.methods import METHODS
from dllm_sd.policies.decoding import Decoding
from dllm_sd.policies.model import Model
from dllm_sd.ranges import Count, Ranged, Seed, Size, check
from dllm_sd.settings import Checkpoints, Evaluation, Log, Optim, Peers
from dllm_sd.tasks import TASKS
from dllm_sd.tasks.task import Task


@dataclass(frozen=True)
class Config(Ranged, key=""):
    """One run."""

    task: Task = field(metadata={"parts": TASKS})
    run: str = "runs/unnamed"
    """Folder of the run."""
    seed: Seed = 0
    updates: Count = 500
    model: Model = Model()
    decode: Decoding = Decoding()
    method: Method = Method()
    optim: Optim = Optim()
    eval: Evaluation = Evaluation()
    checkpoint: Checkpoints = Checkpoints()
    log: Log = Log()
    peers: Peers | None = None
    """Two students that teach each other; None trains one model."""
    max_prompt: Size = 512
    """Longest prompt in tokens; problems with longer prompts are left out and counted, never cut."""
    cache: str | None = None
    """Folder of what writers wrote, by content, to be found by other runs too; None is `written` in the run folder."""
    resume: Literal["auto", "force", "fresh"] = "auto"
    """`auto` continues a run of the same configuration and refuses another's folder, `force` continues in spite of
    changed settings, `fresh` discards what the folder holds of a former run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.run:
            raise InputError("run is empty; name the folder of the run")
        begun = [i for i, one in enumerate(self.peers.students) if one.start] if self.peers else []
        if begun and self.model.lora is None:
            raise InputError(
                f"peers.students.{begun[0]}.start is an adapter, but model.lora is null; set model.lora, or name whole "
                f"weights in peers.students.{begun[0]}.path"
            )
        if self.peers and self.updates % self.peers.rounds:
            raise InputError("updates must be a multiple of peers.rounds, so that all rounds are of one length")


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """Read a config by path or shipped name and apply ``key=value`` overrides.

    Raises:
        InputError: naming the file or key, and the remedy.
    """
    path = find_config(name)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read config {path}: {error}") from error
    except yaml.YAMLError as error:
        raise InputError(f"config {path} is not valid YAML: {on_one_line(error)}") from error
    if not isinstance(tree, dict):
        raise InputError(f"config {path} must hold keys such as model, task and method")
    tree.setdefault("run", f"runs/{path.stem}")
    return build_config(apply_overrides(tree, overrides))


def find_config(name: str) -> Path:
    """A config's path: the argument itself, or a shipped config of that name."""
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_configs()
    if name in shipped:
        return shipped[name]
    raise InputError(f"there is no config file {shown(name)}; {_hint(name, shipped, 'shipped configs:')}")


def shipped_configs() -> dict[str, Path]:
    """Configs that come with the program, by name."""
    here = Path(__file__).resolve().parent
    folders = [here / "configs", here.parent / "configs"]  # installed, or a source checkout
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def apply_overrides(tree: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply ``key=value`` pairs with dotted keys to a plain tree; a replaced `method` starts from its defaults."""
    try:
        config = OmegaConf.create(dict(tree))
    except OmegaConfBaseException as error:
        raise InputError(f"the config cannot be read: {on_one_line(error)}") from error
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise InputError(f"override {override!r} is not of the form key=value")
        try:
            value = yaml.safe_load(text) if text else ""
            for parent in _parents(key):
                if isinstance(OmegaConf.select(config, parent), str):  # `method: name` grows into a mapping
                    OmegaConf.update(config, parent, {"name": OmegaConf.select(config, parent)}, merge=False)
            OmegaConf.update(config, key, value, merge=False, force_add=True)
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise InputError(f"override {override!r} cannot be applied: {on_one_line(error)}") from error
    try:
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise InputError(f"the config does not resolve: {on_one_line(error)}") from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def build_config(tree: Mapping[str, Any]) -> Config:
    """Validate a plain tree and build the config."""
    config = _build(Config, tree, "", None)
    schedules: dict[str, dict[str, Any]] = {}
    for name, overrides in config.eval.schedules.items():
        decode = _build(Decoding, overrides, f"eval.schedules.{name}", config.decode)
        schedules[str(name)] = {key: getattr(decode, key) for key in overrides}
    return replace(config, eval=replace(config.eval, schedules=schedules))


def to_tree(value: Any, table: Mapping[str, type] | None = None) -> Any:
    """The plain tree of a config or part; building it again gives an equal object."""
    if is_dataclass(value) and not isinstance(value, type):
        tree = {_key(f): to_tree(getattr(value, f.name), f.metadata.get("parts")) for f in fields(value)}
        if table is not None:
            name = next(name for name, part in table.items() if part is type(value))
            tree = {"name": name, **tree}
        return tree
    if isinstance(value, tuple | list):
        return [to_tree(item, table) for item in value]
    if isinstance(value, Mapping):
        return {key: to_tree(item) for key, item in value.items()}
    return value


def to_yaml(config: Config) -> str:
    """The resolved config as YAML."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, allow_unicode=True, width=100)


def _key(f: Field[Any]) -> str:
    """The config key of a field; they differ where the key is a word of Python."""
    return f.metadata.get("key", f.name)


def _parents(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _build(cls: type, tree: Any, path: str, base: Any) -> Any:
    """A ``cls`` from ``tree``; what the tree leaves out comes from ``base``, else from the defaults."""
    if cls is Method:
        tree = {"name": tree} if isinstance(tree, str) else tree
        if isinstance(tree, Mapping) and "name" in tree:
            name = str(tree["name"])
            if name not in METHODS:
                raise InputError(f"method {shown(name)} is unknown; {_hint(name, METHODS, 'choose from')}")
            base = METHODS[name].method
            tree = {key: value for key, value in tree.items() if key != "name"}
    if not isinstance(tree, Mapping):
        raise InputError(f"{path or 'the config'} must be a mapping of keys, not {shown(tree)}")
    known = {_key(f): f for f in fields(cls) if f.init}
    for key in tree:
        if key not in known:
            raise InputError(f"unknown key {_join(path, str(key))!r}; {_hint(key, known, 'known keys:')}")
    hints = typing.get_type_hints(cls, include_extras=True)
    values: dict[str, Any] = {}
    for key, f in known.items():
        here, hint = _join(path, key), hints[f.name]
        former = getattr(base, f.name) if base is not None else None
        if key in tree:
            parts = f.metadata.get("parts")
            read = _parts(hint, tree[key], here, former, parts) if parts else _value(hint, tree[key], here, former)
            check(hint, read, here)
            values[f.name] = read
        elif base is not None:
            values[f.name] = former
    if cls is Config and "task" not in values:
        raise InputError(f"the config names no task; set task.name to one of {', '.join(TASKS)}")
    return cls(**values)


def _parts(hint: Any, tree: Any, path: str, base: Any, table: Mapping[str, type]) -> Any:
    """A part of ``table``, or a tuple of parts where the field holds several."""
    if tree is None and type(None) in get_args(hint):
        return None
    if get_origin(hint) is not tuple:
        return _part(tree, path, base, table)
    former = list(base or ())
    if isinstance(tree, Mapping) and tree and all(str(key).isdigit() for key in tree):  # contexts.0.ratio=0.5
        given = {int(key): value for key, value in tree.items()}
        size = max([*given, len(former) - 1]) + 1
        if missing := [i for i in range(len(former), size) if i not in given]:
            raise InputError(f"{path}.{missing[0]} is missing; list entries are numbered from 0 without gaps")
    else:
        given = dict(enumerate(tree if isinstance(tree, list) else [tree]))
        size = len(given)
    bases = [*former, *[None] * size]
    return tuple(_part(given[i], f"{path}.{i}", bases[i], table) if i in given else bases[i] for i in range(size))


def _part(tree: Any, path: str, base: Any, table: Mapping[str, type]) -> Any:
    if isinstance(tree, str):
        tree = {"name": tree}
    if not isinstance(tree, Mapping):
        raise InputError(f"{path} must name a part ({', '.join(table)}), not {shown(tree)}")
    tree = dict(tree)
    name = tree.pop("name", None)
    if name is None and base is None:
        raise InputError(f"{path}.name is missing; choose from {', '.join(table)}")
    if name is not None and str(name) not in table:
        raise InputError(f"{path}.name {shown(name)} is unknown; {_hint(name, table, 'choose from')}")
    if name is None or (base is not None and table[name] is type(base)):
        return _build(type(base), tree, path, base)
    return _build(table[name], tree, path, None)


def _value(hint: Any, value: Any, path: str, base: Any = None) -> Any:
    """``value`` as the type ``hint``, or one sentence why not; what a mapping leaves out comes from ``base``."""
    hint = _plain(hint)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [_plain(option) for option in arguments if option is not type(None)]
        return _value(next((option for option in options if type(value) is option), options[0]), value, path, base)
    if origin is Literal:
        if value in arguments:
            return value
        raise InputError(f"{path} is {shown(value)}; choose from {', '.join(map(str, arguments))}")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{path} must be a list, not {shown(value)}")
        if arguments[-1] is not ... and len(value) != len(arguments):
            raise InputError(f"{path} lists {len(value)} values; give {len(arguments)}")
        kinds = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        return tuple(_value(kind, item, f"{path}.{i}") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))
    if is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else _build(hint, value, path, base if isinstance(base, hint) else None)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-5 as text
        try:
            return float(value)
        except ValueError:
            pass
    if hint in (int, str, bool) and type(value) is hint:
        return value
    if origin is not None and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return dict(value)
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(hint, "a mapping")
    raise InputError(f"{path} must be {wanted}, not {shown(value)}")


def _plain(hint: Any) -> Any:
    """A type without what is annotated to it."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _hint(name: Any, known: Iterable[str], otherwise: str) -> str:
    """The remedy for an unknown name: the known one that it is close to, or all of them."""
    names = list(known)
    close = difflib.get_close_matches(str(name), names, 1)
    return f"did you mean {close[0]!r}?" if close else f"{otherwise} {', '.join(names) or 'none'}"


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
