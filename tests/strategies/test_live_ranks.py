"""Collectives of the ranks that live, where one of them was silent for too long."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import squall
from squall.consistency.client import RevokedError


def test_who_was_given_up_before_the_loop_comes_again_to_where_the_others_wait() -> None:
    said: list[str] = []

    def meet(key: str, kind: str, value: Any) -> dict[int, Any]:
        said.append(key)
        if said.count(key) == 1:
            raise RevokedError
        return {0: "theirs", 1: value}

    strategy = squall.DownpourStrategy()
    strategy._client = SimpleNamespace(meet=meet, greet=lambda: said.append("hello"))  # type: ignore[assignment]
    assert strategy._meet("digest", "mine") == {0: "theirs", 1: "mine"}
    place = said[0]
    assert said == [place, "hello", place], "the same meeting, and not the next at this place"
