"""The strict base of this package's configuration sections.

Each top-level package has its own copy of these few lines, so that none imports another for them;
the architecture test compares the copies.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One section of the YAML file: frozen, unknown keys refused, each field documented in place."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )
