"""Scripts with several commands: the first word chooses, and what follows are the arguments of that one."""

from collections.abc import Callable
from typing import Any

import tyro


def run_command(commands: dict[str, tuple[type, Callable[[Any], int | None]]], argv: list[str] | None = None) -> int:
    """Run the command that the command line names; a command is a frozen dataclass of arguments, and what takes it.

    Returns: the exit code; 0 unless the command returns one.
    """
    kinds = {name: kind for name, (kind, _) in commands.items()}
    args = tyro.extras.subcommand_cli_from_dict(kinds, args=argv, use_underscores=True)
    return next(run for kind, run in commands.values() if type(args) is kind)(args) or 0
