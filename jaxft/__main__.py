"""The command line: ``jaxft train | eval | predict | convert | show-config``. Thin: each command lives in ``jaxft.commands``.

Problems that the user can fix are printed as one line and end with exit code 2; nothing half-written is left behind.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time

STARTED = time.perf_counter()

COMMANDS = {
    "train": "fine-tune a model on labelled text",
    "eval": "score a model on labelled text",
    "predict": "label text from a file, standard input or the command line",
    "convert": "convert weights between Hugging Face formats and jaxft checkpoints",
    "show-config": "print the resolved configuration of a run file",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    from jaxft import __version__
    from jaxft.errors import UserError

    parser = argparse.ArgumentParser(
        prog="jaxft",
        description="Train, fine-tune and ship Transformers with JAX and Flax: Hugging Face weights in, Hugging Face folders out.",
    )
    parser.add_argument("--version", action="version", version=f"jaxft {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    given = sys.argv[1:] if arguments is None else arguments
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary.capitalize() + ".")
        # Only the command asked for is imported: `jaxft --help` stays quick.
        if name in given:
            module = importlib.import_module(f"jaxft.commands.{name.replace('-', '_')}")
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    options = parser.parse_args(given)
    try:
        return options.run(options)
    except UserError as error:
        print(f"jaxft {options.command}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"jaxft {options.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
