"""What a command line got wrong, as a sentence: an unknown command or option, a missing or wrong value.

tyro rejects a command line through a hook that is not part of its public interface. Where a version lacks it, tyro's
own words appear instead.
"""

import contextlib
import dataclasses
import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from experiments.harness.runs.command_line import Mistake

KINDS = {"INT": "a whole number", "N": "a whole number", "FLOAT": "a number", "PATH": "a path", "DIR": "a folder"}
"""What an option takes, by its placeholder in the help text."""

EXAMPLES = {"TARGET": "table1", "RUN": "0c43d2", "CLAIM": "msam-over-sam"}


def not_one_of(kind: str, word: str, known: Sequence[str]) -> str:
    """The sentence for a word that is not known, with the closest one that is."""
    close = get_close_matches(word, known, 1, 0.6)
    listed = ", ".join(known)
    if close:
        return f"Unknown {kind} {word!r}: did you mean {close[0]}? All of them: {listed}."
    return f"Unknown {kind} {word!r}: choose one of {listed}."


@contextlib.contextmanager
def sentences(program: str, commands: Mapping[str, Callable[..., Any]] | Callable[..., Any]) -> Iterator[None]:
    """Within the block, a command line that tyro rejects raises a `Mistake`.

    Args:
        program: As the user types it, for example "python -m experiments".
        commands: The functions of the commands by name, or the one function or dataclass of a program without any.
    """
    try:
        from tyro import _errors as tyro_errors

        hooked: Any = tyro_errors.on_parse_error(lambda event: _reject(event, program, commands))
    except (ImportError, AttributeError):
        hooked = contextlib.nullcontext()
    with hooked:
        yield


def _reject(event: Any, program: str, commands: Mapping[str, Callable[..., Any]] | Callable[..., Any]) -> None:
    """Raise the sentence for an event of tyro's hook; return for one that is not known, which tyro then prints.

    Raises:
        Mistake: always, for a known event.
    """
    words, kind = sys.argv[1:], type(event).__name__
    named = words[0] if words and not words[0].startswith("-") else ""
    if isinstance(commands, Mapping):
        known = ", ".join(commands)
        if not named:
            raise Mistake(f"Say what to do: {program} COMMAND, with one of the commands {known}.")
        if named not in commands:
            raise Mistake(not_one_of("command", named, list(commands)))
        program, function = f"{program} {named}", commands[named]
    else:
        function = commands
    see = f"`{program} --help` lists the options."
    argument: Any = getattr(event, "argument", None)
    if kind == "UnrecognizedArgs":
        raise Mistake(f"{_unrecognized(event.tokens[0], _options(function))} {see}")
    if kind == "MissingArgs":
        name = str(event.missing_arguments[0].arg.lowered.metavar)
        raise Mistake(f"{name} is missing: {program} {name}, as in {program} {EXAMPLES.get(name, name)}.")
    if kind == "BadValue":
        raise Mistake(f"{argument.display_name()} needs a value. {see}")
    if kind in ("InstantiationFailure", "InvalidChoice") and argument is not None:
        option = str(argument.lowered.metavar) if argument.is_positional() else argument.lowered.name_or_flags[-1]
        raise Mistake(f"{option} is {_given(option, event)!r}, but must be {_allowed(argument)}. {see}")


def _unrecognized(token: str, options: Sequence[str]) -> str:
    if not token.startswith("-"):
        return f"{token!r} is one word too many: a value follows the name of its option, as in --profile smoke."
    name = token.partition("=")[0]
    close = get_close_matches(name.replace("_", "-"), options, 1, 0.6)
    return f"Unknown option {name}: did you mean {close[0]}?" if close else f"Unknown option {name}."


def _given(option: str, event: Any) -> str:
    """The value that was given for an option."""
    if hasattr(event, "value"):
        return str(event.value)
    if match := re.search(r"from \['(.*?)'\]", event.message):
        return match.group(1)
    words = [word for given in sys.argv for word in given.split("=", 1)]
    return words[words.index(option) + 1] if option in words[:-1] else ""


def _allowed(argument: Any) -> str:
    """What an option takes, in words."""
    if choices := argument.lowered.choices:
        return f"one of {', '.join(map(str, choices))}"
    placeholders = re.findall(r"[A-Z]+", str(argument.lowered.metavar))
    return next((KINDS[name] for name in placeholders if name in KINDS), f"a value like {argument.lowered.metavar}")


def _options(function: Callable[..., Any]) -> list[str]:
    """The options of a command: its parameters, and the fields of those that are dataclasses."""
    if isinstance(function, type):
        return [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(function)]
    options = []
    hints = typing.get_type_hints(function, include_extras=True)
    for name in inspect.signature(function).parameters:
        annotation, *metadata = typing.get_args(hints[name]) or (hints[name],)
        if dataclasses.is_dataclass(annotation):
            options += [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(annotation)]
        else:
            renamed = next((one.name for one in metadata if getattr(one, "name", None)), name)
            options.append(f"--{renamed.replace('_', '-')}")
    return options
