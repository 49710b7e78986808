"""Unit tests need no Ray: one that starts one fails, for those behind it would join it."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def no_ray() -> Iterator[None]:
    yield
    ray = sys.modules.get("ray")
    if ray is not None and hasattr(ray, "is_initialized") and ray.is_initialized():
        ray.shutdown()
        pytest.fail("a Ray was started: some of Ray's functions do so by themselves")
