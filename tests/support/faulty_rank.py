"""A rank of `solomonov prove --layouts` with a fault: `python -m tests.support.faulty_rank FOLDER LIST`.

At ZeRO stage 2 one gradient of the second layer is a thousandth too large; at ZeRO stage 3 with one micro-batch the
process ends in the middle.
"""

from __future__ import annotations

import os
import sys

from solomonov.engine import Engine
from solomonov.equivalence import Case
from solomonov.equivalence_rank import main

FAULTY = "layers.1.attention.v.weight"


def scale_a_gradient(engine: Engine, factor: float = 1.001) -> None:
    """Of FAULTY, on this rank, in every backward pass."""
    for parameter, name in engine.names.items():
        if name == FAULTY:
            parameter.register_hook(lambda gradient: gradient * factor)


def plant(case: Case, engine: Engine) -> None:
    """The faults."""
    if case.zero_stage == 2:
        scale_a_gradient(engine)
    if case.zero_stage == 3 and case.accumulation == 1:
        print("out of luck", flush=True)
        os._exit(3)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], plant))
