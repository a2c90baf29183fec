"""The command line, ``jaxft COMMAND``. Thin: each command lives in ``jaxft.cli``.

Problems that the user can fix are printed as one line and end with the exit code of their kind; nothing half-written is left behind.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

STARTED = time.perf_counter()

COMMANDS = {
    "train": "train or fine-tune a model on texts, images or speech",
    "sweep": "try many settings of a run, each with several seeds, and rank them",
    "eval": "score a model on rows that say what is right",
    "predict": "label texts or images: files, standard input or the command line",
    "generate": "go on with texts",
    "transcribe": "write what recordings of speech say",
    "score": "add to rows how probable their replies are under a model",
    "mine": "find hard negatives for pairs of texts with a trained embedding model",
    "data": "what a run's loader will see: lengths, labels, duplicates, rows as tokens; build: tokenise texts once, to pre-train on",
    "tokenizer": "learn a tokenizer of texts: WordPiece, BPE or Unigram",
    "cache": "encode a run's rows once, to files that training reads without holding them in memory",
    "plan": "memory, traffic and time of a run on hardware that need not be there",
    "doctor": "what this machine or cluster is, how fast it is, and what looks wrong",
    "bench": "time attention backends on this machine",
    "convert": "convert weights between Hugging Face formats and jaxft checkpoints",
    "checkpoint": "list, inspect, verify, export and prune what a run has stored",
    "show-config": "check a run file and print its resolved configuration",
    "completion": "print a script that completes commands, options and keys in bash or zsh",
}


_NO_MEMORY = (
    "not enough memory: take smaller batches (train.batch_size, train.accumulation, eval.batch_size), shorter rows (data.max_length), "
    "model.remat=full, or a smaller model; jaxft plan says what a run takes"
)


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    from jaxft import __version__

    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] in COMMANDS:
        # Only the command asked for is imported: `jaxft --help` stays quick.
        module = importlib.import_module(f"jaxft.cli.{given[0].replace('-', '_')}")
        parser = _Parser(prog=f"jaxft {given[0]}", description=COMMANDS[given[0]].capitalize() + ".")
        module.add_arguments(parser)
        # Intermixed: key=value pairs may stand before and after options.
        options = parser.parse_intermixed_args(given[1:])
        return _run(given[0], module.run, options)
    parser = _Parser(
        prog="jaxft",
        description="Train, fine-tune and ship Transformers with JAX and Flax: Hugging Face weights in, Hugging Face folders out.",
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"jaxft {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary)
    parser.parse_args(given)
    return parser.error("name a COMMAND first, then its arguments")


def _epilog() -> str:
    from jaxft.errors import EXIT_CODES

    codes = "\n".join(f"  {code:<4} {meaning}" for code, meaning in EXIT_CODES.items())
    return f"jaxft COMMAND --help says more about each.\n\nexit codes:\n{codes}"


class _Parser(argparse.ArgumentParser):
    """Wrong usage is told in one line too."""

    def error(self, message: str) -> NoReturn:
        begin, end = f"{self.prog}: error: ", f"; {self.prog} --help says more"
        self.exit(2, f"{begin}{_fitted(message, begin, end)}{end}\n")


def _run(command: str, run: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    from jaxft.cli.console import drop_output, no_interrupt, show_anything
    from jaxft.errors import StorageError, UserError, out_of_memory, storage_problem
    from jaxft.machine import signals

    show_anything()
    try:
        code = run(options)
        sys.stdout.flush()  # a full disk is to be told here, not by Python at exit
        return code
    except UserError as error:
        return _refuse(command, str(error), error.exit_code)
    except BrokenPipeError:
        drop_output(sys.stdout)  # its reader (head, less) has gone
        return 1
    except OSError as error:
        # A full disk, a folder that may not be written, a path through a file: the user's to fix, wherever it shows.
        if error.filename is None and error.strerror is None:
            raise
        where = error.filename2 or error.filename
        if where is None and _output_is_lost():
            where = "standard output"
            drop_output(sys.stdout)
        kind = UserError if storage_problem(error) is None else StorageError
        return _refuse(command, ": ".join(str(part) for part in (where, error.strerror) if part), kind.exit_code)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return _refuse(command, f"{_NO_MEMORY} ({error})")
    except KeyboardInterrupt as told:
        with no_interrupt():
            print(
                f"jaxft {command}: interrupted{''.join(f' ({name})' for name in told.args)}",
                file=sys.stderr,
                flush=True,
            )
            if signals.program() is not None:
                signals.end_now(signals.STOPPED)  # threads of a save that was cut off never end
            _end_if_compiling(signals.STOPPED)
            return signals.STOPPED


def _output_is_lost() -> bool:
    """Whether it was standard output that could not be written: then it still cannot."""
    try:
        print(flush=True)
    except OSError:
        return True
    return False


def program() -> NoReturn:
    """The program ``jaxft``: one command, and the end of the process."""
    from jaxft.machine.signals import say_leaving, told_by_signals
    from jaxft.machine.streams import open_closed_streams

    open_closed_streams()
    with told_by_signals(sys.argv[1] if len(sys.argv) > 1 else ""):
        try:
            code = main()
        except Exception:  # noqa: BLE001 - a fault of jaxft, told as Python tells it
            say_leaving(1)  # unless another process is gone: then that is why, and this ends the process
            traceback.print_exc()
            code = 1
        say_leaving(code)
        _end_if_compiling(code, together=code in (0, 130))
        sys.exit(code)


def _end_if_compiling(code: int, *, together: bool = False) -> None:
    """Ends the process if a compiler is still at work: Python would wait for it, or crash.

    Args:
      together: all processes of the run come here, and count on being told that this one leaves.
    """
    if "jaxft.machine.threads" not in sys.modules or not sys.modules["jaxft.machine.threads"].still_working():
        return
    if together and "jax" in sys.modules:
        from jaxft.machine.processes import leave

        leave()
    from jaxft.machine.signals import end_now

    end_now(code)


def _refuse(command: str, message: str, code: int = 2) -> int:
    # Messages of libraries that are passed on may have several lines; scripts read one.
    begin = f"jaxft {command}: error: "
    print(f"{begin}{_fitted(message, begin)}", file=sys.stderr)
    return code


def _fitted(message: str, begin: str, end: str = "") -> str:
    """A message as far as it fits on one line, between its beginning and its end."""
    from jaxft.errors import LONGEST_LINE, one_line

    return one_line(message, LONGEST_LINE - len(begin) - len(end))


if __name__ == "__main__":
    program()
