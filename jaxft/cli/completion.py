"""``jaxft completion``: a script that teaches a shell the commands, their options, and the keys of run files."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import typing
from collections.abc import Iterator

from jaxft.config import RunConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("shell", choices=["bash", "zsh"])
    parser.epilog = 'for this shell: eval "$(jaxft completion bash)"; for all, the same line in ~/.bashrc or ~/.zshrc'


def run(options: argparse.Namespace) -> int:
    """Prints the script."""
    print(script(options.shell))
    return 0


def script(shell: str) -> str:
    """The script for a shell: words that are fixed when it is made, so that completing starts no Python."""
    from jaxft.__main__ import COMMANDS

    options = "\n".join(f"        {name}) words='{' '.join(_options(name))}' ;;" for name in COMMANDS)
    values = "\n".join(f"        {key}) words='{' '.join(values)}' ;;" for key, values in choices() if values)
    keys = " ".join(f"{key}=" for key, _ in choices())
    begin = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return begin + _SCRIPT.format(commands=" ".join(COMMANDS), options=options, values=values, keys=keys)


def choices(schema: type = RunConfig, prefix: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
    """(key, the values it may have if these are few names) of every setting of a run file."""
    for name, kind in typing.get_type_hints(schema).items():
        key = f"{prefix}{name}"
        if dataclasses.is_dataclass(kind):
            yield from choices(typing.cast(type, kind), f"{key}.")
        else:
            yield key, tuple(_names(kind))


def _names(kind: object) -> Iterator[str]:
    if kind is bool:
        yield from ("true", "false")
    elif typing.get_origin(kind) is typing.Literal:
        yield from map(str, typing.get_args(kind))
    else:
        for part in typing.get_args(kind):
            if typing.get_origin(part) is typing.Literal:
                yield from _names(part)


def _options(command: str) -> list[str]:
    parser = argparse.ArgumentParser(add_help=True)
    importlib.import_module(f"jaxft.cli.{command.replace('-', '_')}").add_arguments(parser)
    return [name for action in parser._actions for name in action.option_strings if name.startswith("--")]


# Bash takes "key=value" apart at "=", zsh does not.
_SCRIPT = """\
_jaxft() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words='' key=''
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W '{commands}' -- "$word"))
        return
    fi
    if [ "$word" = '=' ]; then
        key=$before word=''
    elif [ "$before" = '=' ]; then
        key=${{COMP_WORDS[COMP_CWORD-2]}}
    fi
    if [ -n "$key" ]; then
        case $key in
{values}
        esac
        COMPREPLY=($(compgen -W "$words" -- "$word"))
        return
    fi
    case ${{COMP_WORDS[1]}} in
{options}
    esac
    case $word in
        -*) ;;
        *) words='{keys}'
            if type compopt > /dev/null 2>&1; then compopt -o nospace 2> /dev/null; fi ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _jaxft jaxft"""
