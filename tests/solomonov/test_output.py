"""What a rank prints never ends it, checked on the device that is always full."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import ROOT, program_environment

CODE = (
    "from solomonov.output import protect_output; import sys\n"
    "{protect}\n"
    "print('x' * 100000, flush=True)\n"
    "print('end', file=sys.stderr)"
)


@pytest.mark.parametrize(("protect", "code"), [("protect_output()", 0), ("", 1)], ids=["protected", "control"])
def test_a_full_disk_takes_the_text_and_not_the_process(protect: str, code: int, tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full, (tmp_path / "err").open("w") as errors:
        done = subprocess.run(
            [sys.executable, "-c", CODE.format(protect=protect)],
            stdout=full,
            stderr=errors,
            cwd=ROOT,
            env=program_environment(),
            check=False,
        )
    # 120 is Python's own: it could not flush standard output at exit.
    assert (done.returncode in (0, 120)) == (code == 0)
    assert ("end" in (tmp_path / "err").read_text()) == (code == 0)


def test_text_passes_through() -> None:
    code = (
        "from solomonov.output import protect_output; import sys; protect_output(); print('one', sys.stdout.fileno())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "one 1\n"
