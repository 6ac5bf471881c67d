"""The command line `flexicodec-hf`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from . import app, codec, convert, evaluate, export, serve, speak, tokenize
from .common import PROGRAM, CommandError, Parser, report_error, user_errors


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run a command.

    Args:
        argv: The arguments; those of the process by default.

    Returns:
        The exit status: 0, 1 if something failed, 130 if the user interrupted.

    Raises:
        SystemExit: With status 2 if the arguments are wrong; with 0 after `--help` and `--version`.
    """
    from .. import __version__

    parser = Parser(
        prog=PROGRAM, description="FlexiCodec: speech to tokens at 3 to 12.5 a second, and back; text to speech."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (codec, speak, serve, app, tokenize, evaluate, convert, export):
        module.add_commands(commands)
    args = parser.parse_args(argv)
    importlib.import_module("flexicodec_hf.registration")
    try:
        with user_errors():
            return args.run(args)
    except CommandError as error:
        report_error(error)
        return 1
    except KeyboardInterrupt:
        report_error("interrupted")
        return 130
