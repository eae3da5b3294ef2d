"""Programs with the names of Slurm's commands, for what no cluster does on demand: they note how they were called, and
answer from a script."""

from __future__ import annotations

import os
from pathlib import Path


def fake_commands(folder: Path, **scripts: str) -> dict[str, str]:
    """Make the commands in a folder.

    Args:
        folder: gets them, and `NAME.calls`: the arguments of each call, each one with a NUL after it, a newline at the
            end of a call.
        scripts: name of a command -> what it does, for sh.

    Returns:
        This process's environment with the folder first on the PATH.
    """
    folder.mkdir(exist_ok=True)
    for name, script in scripts.items():
        program = folder / name
        program.write_text(f'#!/bin/sh\n{{ printf "%s\\0" "$@"; echo; }} >> "{folder / name}.calls"\n{script}\n')
        program.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def calls(folder: Path, name: str) -> list[list[str]]:
    """The arguments of each call of a command so far, where none holds a newline."""
    path = folder / f"{name}.calls"
    lines = path.read_bytes().decode(errors="surrogateescape").split("\n")[:-1] if path.exists() else []
    return [line.split("\0")[:-1] for line in lines]
