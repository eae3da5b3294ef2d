"""`python -m data_pipeline serve RUN_DIR`: the data service of a run, as its supervisor starts it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_pipeline", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    serve = verbs.add_parser("serve", help="start the data workers of a run on its Ray cluster and keep them alive")
    serve.add_argument("run_folder", metavar="RUN_DIR", type=Path)
    options = parser.parse_args(arguments)

    from data_pipeline.service import serve as run_service

    return run_service(options.run_folder)


if __name__ == "__main__":
    sys.exit(main())
