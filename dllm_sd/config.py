"""The configuration: a schema of dataclasses, read from YAML with dotted overrides and checked before anything loads.

Parts of a method, and tasks, are chosen by `name` from tables; their fields are config keys. A method keeps
the values of the named method for keys that are left out.
"""

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from textwrap import wrap
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from dllm_sd.config_files import read_config, shipped_configs
from dllm_sd.decoding.settings import Decoding
from dllm_sd.errors import InputError, shortened, shown
from dllm_sd.files.plain_yaml import write_yaml
from dllm_sd.files.writing import FUNCTION, PLACE, Place, at_home, whole_path
from dllm_sd.keys import unknown_key, unknown_name
from dllm_sd.methods import METHODS
from dllm_sd.methods.differences import named_differences
from dllm_sd.methods.method import Method
from dllm_sd.overrides import apply_overrides, parse_index
from dllm_sd.parts import key_of, to_tree
from dllm_sd.plugins import import_plugins, with_plugins
from dllm_sd.pretrained.model import Model
from dllm_sd.ranges import LIMIT, Count, Ranged, Seed, Size, check, hints_of
from dllm_sd.settings import Checkpoints, Evaluation, Log, Optim, Peers
from dllm_sd.tasks import TASKS
from dllm_sd.tasks.task import Task

__all__ = [
    "Config",
    "apply_overrides",
    "build_config",
    "build_decoding",
    "load_config",
    "path_keys",
    "shipped_configs",
    "to_tree",
    "to_yaml",
    "with_whole_paths",
]


@dataclass(frozen=True)
class Config(Ranged, key=""):
    """One run."""

    task: Task = field(metadata={"parts": TASKS})
    """The task: where problems come from, and how completions are graded."""
    run: Place = "runs/unnamed"
    """Folder of the run."""
    seed: Seed = 0
    """Seed of the random choices of the run: order of problems, decoding, masks, dropout."""
    updates: Count = 500
    """Number of updates (optimizer steps) of the run, counting those that are skipped."""
    model: Model = Model()
    decode: Decoding = Decoding()
    method: Method = Method()
    optim: Optim = Optim()
    eval: Evaluation = Evaluation()
    checkpoint: Checkpoints = Checkpoints()
    log: Log = Log()
    plugins: tuple[Place, ...] = ()
    """Files of Python that are imported before anything else, such as one with a method of your own. They are looked
    for beside the config and in the working directory, and stored with their whole path."""
    peers: Peers | None = None
    """Two students that teach each other; None trains one model."""
    max_prompt: Size = 512
    """Longest prompt in tokens; problems with longer prompts are left out and counted, never cut."""
    cache: Place | None = None
    """Folder in which texts of writers are cached, also for other runs; None is `written` in the run folder."""
    resume: Literal["auto", "force", "fresh"] = "auto"
    """`auto` continues a run of the same configuration and refuses the folder of another one, `force` continues with
    changed settings, `fresh` discards the former run in the folder."""

    def held_out(self, schedule: str | None = None) -> Decoding:
        """Decoding settings for held-out problems: `decode` with the overrides of `eval.decode` and of a schedule."""
        return replace(self.decode, **{**self.eval.decode, **(self.eval.schedules[schedule] if schedule else {})})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.run:
            raise InputError("run is empty; name the folder of the run")
        students = self.peers.students if self.peers else ()
        starts = [i for i, student in enumerate(students) if student.start]
        if starts and self.model.lora is None:
            raise InputError(
                f"peers.students.{starts[0]}.start is an adapter, but model.lora is null; set model.lora, or name "
                f"whole weights in peers.students.{starts[0]}.path"
            )
        if self.peers and self.updates % self.peers.rounds:
            raise InputError("updates must be a multiple of peers.rounds, so that all rounds have the same length")


def load_config(
    name: str, overrides: Sequence[str] = (), say: Callable[[str], object] = lambda sentence: None
) -> Config:
    """Read a config by path, shipped name or run folder, and apply ``key=value`` overrides.

    Args:
        name: the path or the name.
        overrides: as of `apply_overrides`.
        say: called with a sentence on keys of the config that an override made useless.

    Raises:
        InputError: naming the file or key, and the remedy.
    """
    return build_config(read_config(name, overrides, say))


def build_config(tree: Mapping[str, Any]) -> Config:
    """Validate a plain tree and build the config; its plugins are imported first."""
    tree = with_plugins(tree)
    import_plugins(tree.get("plugins") or ())
    config = _build(Config, tree, "", None)
    overridden = config.eval.decode
    held_out = _build(Decoding, overridden, "eval.decode", config.decode)
    schedules: dict[str, dict[str, Any]] = {}
    for name, overrides in config.eval.schedules.items():
        decode = _build(Decoding, overrides, f"eval.schedules.{name}", held_out)
        schedules[str(name)] = {key: getattr(decode, key) for key in overrides}
    for key, changes in {"eval.decode": overridden, **{f"eval.schedules.{k}": v for k, v in schedules.items()}}.items():
        if "engine" in changes:
            raise InputError(f"{key}.engine would be another than decode.engine; leave it out")
    resolved = {key: getattr(held_out, key) for key in overridden}
    return replace(config, eval=replace(config.eval, decode=resolved, schedules=schedules))


def build_decoding(tree: Mapping[str, Any], base: Decoding, key: str) -> Decoding:
    """The keys of `decode` that somebody gives under ``key``; what is left out stays as in ``base``."""
    return _build(Decoding, tree, key, base)


def with_whole_paths(config: Config) -> Config:
    """The config with absolute paths of files that are there, for use from any working folder; `run` stays as it is."""
    return replace(_whole(config), run=config.run)


def _whole(value: Any, hint: Any = None) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        hints = hints_of(type(value))
        new = {f.name: _whole(getattr(value, f.name), hints[f.name]) for f in fields(value) if f.init}
        changed = {name: part for name, part in new.items() if part != getattr(value, name)}
        return replace(value, **changed) if changed else value
    if isinstance(value, tuple):
        return tuple(_whole(item, get_args(hint)[0] if get_args(hint) else None) for item in value)
    if not isinstance(value, str):
        return value
    marks = [mark for kind in (hint, *get_args(hint)) for mark in get_args(kind)]
    return whole_path(value) if PLACE in marks or (FUNCTION in marks and ".py:" in value) else value


def path_keys() -> frozenset[str]:
    """The names of the keys of a config that hold paths, or may, by their types; those of plugins' parts included."""
    found: set[str] = set()
    seen: set[Any] = set()
    waiting: list[Any] = [Config]
    while waiting:
        cls = waiting.pop()
        if cls in seen:
            continue
        seen.add(cls)
        hints = hints_of(cls)
        for f in fields(cls):
            kinds = [hints[f.name]]
            for kind in kinds:  # grows: the kinds that a union or a tuple is made of
                kinds += get_args(kind)
            if any(kind in (PLACE, FUNCTION) for kind in kinds):
                found.add(key_of(f))
            waiting += [kind for kind in kinds if isinstance(kind, type) and is_dataclass(kind)]
            waiting += (f.metadata.get("parts") or {}).values()
    return frozenset(found)


def to_yaml(config: Config) -> str:
    """The resolved config as YAML, with a comment that names the closest method and what differs from it."""
    comment = "\n".join(f"# {line}" for line in wrap(named_differences(config.method).sentence, 110))
    return write_yaml(to_tree(config)).replace("\nmethod:\n", f"\n{comment}\nmethod:\n", 1)


def _build(cls: type, tree: Any, path: str, base: Any) -> Any:
    """Build a ``cls`` from ``tree``; keys that the tree leaves out come from ``base``, else from the defaults."""
    if cls is Method:
        tree = {"name": tree} if isinstance(tree, str) else tree
        if isinstance(tree, Mapping) and tree.get("name") is not None:
            name = str(tree["name"])
            if name not in METHODS:
                raise unknown_name("method", name, METHODS)
            base = METHODS[name].method
    if not isinstance(tree, Mapping):
        raise InputError(f"{path or 'the config'} must be a mapping of keys, not {shown(tree)}")
    known = {key_of(f): f for f in fields(cls) if f.init}
    renamed: Mapping[str, str] = vars(cls).get("former_keys", {})
    for key in tree:
        if key in renamed:
            raise InputError(f"{_join(path, str(key))} is now {renamed[key]}; set that")
        if key not in known:
            raise unknown_key(path, str(key), known)
    hints = hints_of(cls)
    values: dict[str, Any] = {}
    for key, f in known.items():
        key_path, kind = _join(path, key), hints[f.name]
        former = getattr(base, f.name) if base is not None else None
        if key in tree:
            parts = f.metadata.get("parts")
            given = tree[key]
            value = _parts(kind, given, key_path, former, parts) if parts else _value(kind, given, key_path, former)
            check(kind, value, key_path)
            values[f.name] = value
        elif base is not None:
            values[f.name] = former
    if cls is Config and "task" not in values:
        raise InputError(f"the config has no task; set task.name to one of {', '.join(TASKS)}")
    missing = [key for key, f in known.items() if f.name not in values and f.default is f.default_factory is MISSING]
    if missing:
        raise InputError(f"{_join(path, missing[0])} is missing; set it")
    return cls(**values)


def _parts(hint: Any, tree: Any, path: str, base: Any, table: Mapping[str, type]) -> Any:
    """Build a part of ``table``, or a tuple of parts if the field holds several."""
    if tree is None and type(None) in get_args(hint):
        return None
    if get_origin(hint) is not tuple:
        return _part(tree, path, base, table)
    former = list(base or ())
    if isinstance(tree, Mapping) and tree and "name" not in tree:  # contexts.0.ratio=0.5
        given = {parse_index(key, path): value for key, value in tree.items()}
        size = max(len(former), max(given) + 1)
        if (missing := next((i for i in range(len(former), size) if i not in given), None)) is not None:
            raise InputError(f"{path}.{missing} is missing; list entries are numbered from 0 without gaps")
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
        raise unknown_name(path, name, table)
    if name is None or (base is not None and table[name] is type(base)):
        return _build(type(base), tree, path, base)
    return _build(table[name], tree, path, None)


def _value(hint: Any, value: Any, path: str, base: Any = None) -> Any:
    """Convert ``value`` to the type ``hint``; keys that a mapping leaves out come from ``base``.

    Raises:
        InputError: if the value does not have this type.
    """
    if (PLACE in get_args(hint) or FUNCTION in get_args(hint)) and isinstance(value, str):
        return at_home(value, path)
    hint = _plain(hint)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [option for option in arguments if option is not type(None)]
        fitting = next((option for option in options if type(value) is _plain(option)), options[0])
        if get_origin(fitting) is Literal and not isinstance(value, str):
            choices = ", ".join(map(str, get_args(fitting)))
            raise InputError(f"{path} is {shown(value)}; choose {choices}{' or null' * (type(None) in arguments)}")
        return _value(fitting, value, path, base)
    if origin is Literal:
        value = _ALIASES.get(value, value) if isinstance(value, str) else value
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
        return float(value) if abs(value) <= LIMIT else value  # `check` refuses what is larger
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
    if hint is str and isinstance(value, Mapping) and [*value.values()] == [None]:  # {field} in YAML
        text = f"{{{next(iter(value))}}}"
        raise InputError(
            f'{path} must be text, and {shortened(text)} is a mapping in YAML; put it in quotes: "{shortened(text)}"'
        )
    raise InputError(f"{path} must be {wanted}, not {shown(value)}")


_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
"""Other names of choices."""


def _plain(hint: Any) -> Any:
    """The type inside of ``Annotated``."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
