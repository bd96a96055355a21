"""Every problem a user can cause is one line on stderr and an exit code, never a traceback."""

import io
import sys
from typing import Any

from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup


INVALID_USAGE, FAILED = 2, 1


class UsageProblem(Exception):
    """What was asked for cannot be done as it was asked; like a mistyped option it ends with exit code 2."""

    exit_code = INVALID_USAGE


class OneLineErrors(TyperGroup):
    """A group of commands that reports errors in one line. Ctrl-C ends with 130 and says nothing."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        if isinstance(sys.stdout, io.TextIOWrapper):
            # Names of files need not be text
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            exit_code = super().main(*args, **kwargs)
        except (UsageProblem, ImportError, OSError, ValueError, RuntimeError, MemoryError) as error:
            exit_code = report(error)
        except Exception as error:
            # Where typer's own usage errors live depends on its version; all of them can format themselves
            if not hasattr(error, "format_message"):
                raise
            exit_code = report(error)
        sys.exit(exit_code)


def printable(text: object) -> str:
    """Names of files as they can be shown: neither bytes that are no text, nor what a terminal would obey."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(text))


def report(error: Exception) -> int:
    """Prints an error in one line and returns the exit code it asks for."""
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    line = printable(" ".join(message.split())) or type(error).__name__
    if (context := getattr(error, "ctx", None)) is not None:
        line = f"{line.removesuffix('.')}; see {context.command_path} --help"
    Console(stderr=True).print(Text.assemble(("Error: ", "bold red"), line), soft_wrap=True)
    return getattr(error, "exit_code", FAILED)
