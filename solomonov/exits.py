"""Exit codes: what a command's end says to the one that started it."""

from __future__ import annotations

DONE = 0
"""All work is done."""
DIFFERS = 1
"""What was to be proven does not hold. A crash ends with 1 too, and with a traceback."""
USAGE = 2
"""The command line was wrong."""
NUMERICAL = 70
"""The numbers stopped being finite."""
DAMAGED = 74
"""Data or all checkpoints are damaged beyond repair."""
AGAIN = 75
"""Saved; run me again."""
CONFIGURATION = 78
"""The configuration is wrong; retrying will not help."""
INTERRUPTED = 130
"""Left at once, on the user's second Ctrl-C."""
