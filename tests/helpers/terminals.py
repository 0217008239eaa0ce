"""The command on a terminal of its own."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import termios

from tests.helpers.commands import COMMAND

__all__ = ["in_terminal"]


def in_terminal(
    *args: object, width: int = 80, environment: dict[str, str] | None = None
) -> tuple[int, str]:
    """Exit code of the command, and what it wrote to a terminal, with all that moves the cursor.

    Args:
        args: of the command.
        width: of the terminal.
        environment: variables beside those of this process.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    known = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [str(COMMAND), *map(str, args)],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env={**known, "TERM": "xterm-256color", **(environment or {})},
    )
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # Linux says so when the last writer has gone
            break
        if not part:
            break
        parts.append(part)
    os.close(ours)
    return process.wait(), b"".join(parts).decode(errors="replace").replace("\r\n", "\n")
