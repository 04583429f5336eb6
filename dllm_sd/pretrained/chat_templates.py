"""The choice of the Jinja chat template, and the thinking switch that it may have."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dllm_sd.errors import InputError, os_reason, shown
from dllm_sd.files.reading import parse_json, read_whole
from dllm_sd.files.writing import at_home, names_file

TEMPLATE_KEY = "model.chat_template"
SWITCHES = (
    *("enable_thinking", "thinking", "enable_reasoning", "use_thinking", "thinking_enabled"),
    *("enable_think", "add_thinking", "think", "reasoning"),
)
"""Names that templates give to the variable that turns thinking on or off."""
_SUFFIXES = (".jinja", ".jinja2", ".j2", ".txt", ".json")
_LARGEST = 2**20


def is_template(text: str) -> bool:
    """Whether a text can be a Jinja template: without ``{{`` or ``{%`` it would render every prompt alike."""
    return "{{" in text or "{%" in text


def read_template(given: str) -> str:
    """Return the template that the key `model.chat_template` gives: the text itself, or the content of a file.

    A name that is neither is returned unchanged for `choose_template`, which knows the tokenizer. From a ``.json``
    file, such as a tokenizer_config.json, the key ``chat_template`` is read.

    Raises:
        InputError: if nothing is given, the file does not exist, or it holds no template.
    """
    if not given.strip():
        raise InputError(f"{TEMPLATE_KEY} is empty; give a template, a file or a name, or null for the tokenizer's own")
    if is_template(given) and not names_file(given):
        return given
    path = Path(at_home(given, TEMPLATE_KEY))
    if not (names_file(str(path)) or path.suffix.lower() in _SUFFIXES or "/" in given):
        return given
    where = f"the file {shown(given)} ({TEMPLATE_KEY})"
    try:
        text = read_whole(path, _LARGEST).decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{where} cannot be read ({os_reason(error)}); name a file that holds a template") from None
    except UnicodeDecodeError:
        raise InputError(f"{where} is not UTF-8 text; save it as UTF-8") from None
    if path.suffix.lower() == ".json":
        tree = parse_json(text, f"{where} is not valid JSON", "correct it, or name another file")
        text = tree.get("chat_template") if isinstance(tree, dict) else None
    if not isinstance(text, str) or not is_template(text):
        raise InputError(f"{where} holds no chat template: there is no {{{{ or {{% in it; name another file")
    return text


def choose_template(own: Any, asked: str | None) -> str | None:
    """Choose the template to render with; None where there is none.

    Args:
        own: the tokenizer's templates: a text, several by name, or None.
        asked: the user's or the family's, which takes precedence: a template, or the name of one of the tokenizer's.

    Raises:
        InputError: if no template of the tokenizer has that name, or none of several is its default.
    """
    named = own if isinstance(own, Mapping) else {}
    if isinstance(own, list | tuple):  # the format of tokenizer_config.json
        named = {entry["name"]: entry["template"] for entry in own if _is_named(entry)}
        if len(named) != len(own):
            raise InputError(
                "the tokenizer's chat templates are a list in which not every one has a 'name' of its own and a "
                f"'template'; correct its chat_template, or set {TEMPLATE_KEY} to a template"
            )
    names = ", ".join(sorted(map(str, named)))
    if asked is None:
        if not named:
            return own if isinstance(own, str) and own else None
        if "default" not in named:
            raise InputError(
                f"the tokenizer has several chat templates and no default; set {TEMPLATE_KEY} to one of {names}"
            )
        return named["default"]
    if is_template(asked):
        return asked
    if asked in named:
        return named[asked]
    available = f"templates of this tokenizer: {names}" if named else "this tokenizer has no templates with names"
    raise InputError(
        f"{TEMPLATE_KEY} is {shown(asked)}, which is not a template (it has no {{{{ or {{%), not a file and not the "
        f"name of a template; {available}"
    )


def _is_named(entry: Any) -> bool:
    """Whether an entry of a list of templates has a name and a text."""
    return isinstance(entry, Mapping) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)


class _Generation(Extension):
    """The tag of transformers around the assistant's text; its body is parsed as if the tag were absent."""

    tags = {"generation"}  # noqa: RUF012 (declared so by jinja2)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements inside the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def find_switches(template: str) -> tuple[str, ...]:
    """The variables of `SWITCHES` that a template reads, whether or not it gives them a default of its own.

    Names in comments or texts, fields of a message, and variables that the template only sets do not count.

    Raises:
        jinja2.TemplateSyntaxError: if it is not a template.
    """
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols", _Generation])
    read = find_undeclared_variables(environment.parse(template))
    return tuple(name for name in SWITCHES if name in read)
