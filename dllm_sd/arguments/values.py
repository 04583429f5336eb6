"""Values on the command line: counts, ports, paths; each is refused in one sentence."""

import argparse
from typing import get_args

from dllm_sd.errors import InputError, shown
from dllm_sd.files.writing import at_home
from dllm_sd.ranges import Size, check


def count(text: str) -> int:
    """Parse a count."""
    try:
        check(Size, int(text), "it")
    except ValueError as error:
        most = get_args(Size)[1].most
        raise argparse.ArgumentTypeError(f"give a whole number from 1 to {most}, not {shown(text)}") from error
    return int(text)


def port(text: str) -> int:
    """Parse a port."""
    if not text.isascii() or not text.isdigit() or int(text[:6]) > 65535:
        raise argparse.ArgumentTypeError(f"give a whole number from 0 to 65535, not {shown(text)}")
    return int(text)


def place(text: str) -> str:
    """Parse a path."""
    try:
        if not text:
            raise InputError("a path is empty; name a file or a folder")
        return at_home(text, "the path")
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_overrides(parser: argparse.ArgumentParser, metavar: str = "key=value", example: str = "") -> None:
    """Add the settings that follow the other arguments."""
    parser.add_argument("overrides", nargs="*", default=[], metavar=metavar, help=example or "settings of the config")
