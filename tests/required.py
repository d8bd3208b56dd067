"""What a machine may lack, and CI may not: SQUALL_REQUIRE=slurm,namespaces turns a skip into a failure."""

from __future__ import annotations

import os

import pytest


def needs(kind: str, lacks: str) -> pytest.MarkDecorator:
    """Skip, and say why; or fail where this is required.

    Args:
        kind: Of what is needed, as the environment variable names it.
        lacks: Why it can't be had here; empty if it can.

    """
    is_required = kind in os.environ.get("SQUALL_REQUIRE", "").split(",")
    assert not (lacks and is_required), f"SQUALL_REQUIRE={kind}: {lacks}"
    return pytest.mark.skipif(bool(lacks), reason=lacks or kind)
