"""Errors of the command line in one line, with the closest name that it knows."""

from __future__ import annotations

import argparse
import inspect
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser, Namespace

T = TypeVar("T")

begun: ContextVar[bool] = ContextVar("begun", default=False)
"""Whether training or evaluation has begun: from then on a ValueError may be a bug of the program."""


def nearest(found: str, known: Iterable[str]) -> str:
    """A guess at what was meant, as the end of a sentence; empty if nothing comes close."""
    known = list(known)
    leaves = [name for name in known if name.endswith(f".{found.lstrip('-')}")]  # --lr for --model.optimizer.lr
    near = leaves[:3] or get_close_matches(found, known, n=1, cutoff=0.7)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def of_the_users(error: BaseException) -> bool:
    """Whether an error is about the user's input, so that a traceback would not help."""
    library = type(error).__module__.partition(".")[0]
    if isinstance(error, OSError) or library in {"argparse", "instanceformer", "jsonargparse", "lightning", "wandb"}:
        return True
    return isinstance(error, (ValueError, ModuleNotFoundError)) and not begun.get()


def one_line(error: BaseException) -> str:
    """An error's message and notes in one line; from a DataLoader's worker only the part that says what is wrong."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {error.strerror[:1].lower()}{error.strerror[1:]}"
    if text.startswith("Caught ") and "\nOriginal Traceback" in text:
        lines = text.rstrip().splitlines()
        frames = max(number for number, line in enumerate(lines) if line.startswith("  ") or "Traceback" in line)
        text = re.sub(r"^[\w.]+: ", "", "\n".join(lines[frames + 1 :]))
    parts = (_explained(text) or type(error).__name__, *getattr(error, "__notes__", ()))
    return "; ".join(" ".join(str(part).split()) for part in parts)


def rank() -> str:
    """``[rank N] `` in all processes of a distributed run but the first, where it is empty."""
    number = next((os.environ[name] for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in os.environ), "0")
    return "" if number == "0" else f"[rank {number}] "


def pick(options: type[T], given: Namespace) -> T:
    """A dataclass of options, filled with the values that a command line has under the same names."""
    return options(**{field.name: given[field.name] for field in fields(options)})  # type: ignore[arg-type]


class Parser(ArgumentParser):
    """jsonargparse's parser; its errors are one line instead of the usage of every option."""

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse as jsonargparse does, but treat a configuration file that is not text like any other error."""
        try:
            return super().parse_args(*args, **kwargs)
        except UnicodeDecodeError as error:
            self.error("Problems parsing config", error)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong and exit with code 2."""
        if not self.exit_on_error:  # a nested parser, whose caller says more
            super().error(message, ex)
        args: Sequence[str] = getattr(self, "args", ())
        commands: Mapping[str, ArgumentParser] = next(
            (action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction)), {}
        )
        parser = next((commands[word] for word in args if word in commands), self)
        program = parser.prog.replace(" [options]", "")
        said = _said(message, parser, args)
        said = " ".join(said.split()) + ("" if said.endswith("?") else ";")
        self.exit(2, f"{rank()}{program}: {said} `{program} --help` lists all options\n")


def _said(message: str, parser: ArgumentParser, args: Sequence[str]) -> str:
    """A message of jsonargparse in this package's words."""
    options = [option for option in parser._option_string_actions if option.startswith("--")]
    if match := re.match(r"(?:[Uu]nrecognized arguments|ambiguous option): ([^\s=]+)", message):
        expected = f"an option{nearest(match[1], options)}" if match[1].startswith("-") else "nothing more"
        return f"found {match[1]}, expected {expected}"
    if match := re.match(r"the following arguments are required: (.+)", message):
        return "missing: " + ", ".join(f"--{key}" if f"--{key}" in options else key for key in match[1].split(", "))
    if match := re.search(r"(?:Group '([\w.]+)'.*)?[Oo]ption '([\w.]+)'(?: is not accepted)?$", message):
        key = ".".join(filter(None, match.groups()))
        near = nearest(key, (option[2:] for option in options))
        return f"{_file_with(key, args)}found {key}, expected an option{near}"
    if re.match(r"(Parser key \"config\": )?(Problems parsing|Unexpected) config", message):
        return next(_not_yaml(args), " ".join(message.split()))
    if match := re.match(r'Parser key "([\w.]+)":(.*)', message, re.DOTALL):
        key, option = match[1], f"--{match[1]}"
        file = "" if any(word.startswith(option) for word in args) else _file_with(key, args)
        return f"{file}{option if option in options and not file else key}: {_explained(match[2])}"
    return _explained(message)


CLASS = r"Problem with given class_path '([\w.]+)':\n\s*(.+?)(?=\n\s*- |\n\s*Given value|$)"
UNION = r"Subtypes: [\[(](.+)[\])]\n\s*Errors:\n(.*)\n\s*Given value type: .*?\n\s*Given value: (.*)"


def _explained(message: str) -> str:
    """What is wrong with a value, without the list of everything that was tried with it."""
    message = re.sub(r"^Call to compute_fn of link .*? failed: ", "", message, flags=re.DOTALL)
    if tried := re.findall(CLASS, message, re.DOTALL):
        path, reason = tried[-1]
        if match := re.search(r"[Oo]ption '([\w.]+)'", reason):
            near = nearest(match[1], inspect.signature(resolve_name(path)).parameters)
            return f"{path}: found {match[1]}, expected an argument of it{near}"
        if match := re.match(r"module '([\w.]+)' has no attribute '(\w+)'", reason):
            return f"found {path}, expected a class{nearest(match[2], vars(resolve_name(match[1])))}"
        return f"{path}: {_explained(reason)}"
    if match := re.search(UNION, message, re.DOTALL):
        indent = " " * (len(match[2]) - len(match[2].lstrip()))
        reasons = re.findall(rf"^{indent}- (.+)", match[2], re.MULTILINE)
        plain = [reason for reason in reasons if not re.match("Expected|Not a valid subclass", reason)]
        return plain[0] if plain else f"found {match[3]}, expected {_type(match[1])}"
    if match := re.search(r"Expected an? (.+)\. Got value: (.*)", message, re.DOTALL):
        near = nearest(match[2], re.findall(r"'(\w+)'", match[1])) if "Literal" in match[1] else ""
        message = f"{message[: match.start()]}found {match[2]}, expected {_type(match[1])}{near}"
    return re.sub(r'Parser key "([\w.]+)":\s*', r"\1: ", message)


def _type(text: str) -> str:
    """A type as people write it: ``int``, ``one of a, b``."""
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>|(?:\w+\.)+(\w+)", r"\1\2", text).replace("NoneType", "null")
    return re.sub(r"Literal\[(.+?)\]", r"one of \1", text).replace("'", "")


def _files(args: Sequence[str]) -> list[Path]:
    """The configuration files of a command line, last one first."""
    given = re.findall(r"(?:^|\0)(?:--config|-c)[=\0]([^\0]+)", "\0".join(args))
    return [path for path in map(Path, reversed(given)) if path.is_file()]


def _file_with(key: str, args: Sequence[str]) -> str:
    """``FILE: `` for the last configuration file that has a key; empty if none has."""
    for path in _files(args):
        content: Any = yaml.safe_load(path.read_text())
        for name in key.split("."):
            content = content.get(name, ...) if isinstance(content, dict) else ...
        if content is not ...:
            return f"{path}: "
    return ""


def _not_yaml(args: Sequence[str]) -> Iterator[str]:
    """What is wrong with each configuration file that is not a YAML mapping."""
    for path in _files(args):
        try:
            found = type(yaml.safe_load(path.read_text())).__name__
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            mark = getattr(error, "problem_mark", None)
            found = f"line {mark.line + 1}: {getattr(error, 'problem', '')}" if mark else str(error)
        if found != "dict":
            yield f"{path}: found no options in YAML ({found})"
