"""Pushes that are carried to other hosts while their worker computes the next gradient."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class Courier:
    """Does one thing at a time, in the background.

    Example:
        >>> courier = Courier()
        >>> courier.go(lambda: 1 + 1)
        >>> courier.wait()
        2

    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._result: Any = None
        self._error: BaseException | None = None

    @property
    def is_under_way(self) -> bool:
        """Whether something was begun whose result nobody has taken."""
        return self._thread is not None

    @property
    def is_back(self) -> bool:
        """Whether :meth:`wait` would not wait."""
        return self._thread is not None and not self._thread.is_alive()

    def go(self, errand: Callable[[], Any]) -> None:
        """Begin something. What was begun before must have been waited for."""
        assert self._thread is None, "the courier is under way"

        def run() -> None:
            try:
                self._result = errand()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="squall-courier", daemon=True)
        self._thread.start()

    def wait(self) -> Any:
        """Wait for what was begun.

        Returns:
            Its result.

        Raises:
            BaseException: What it has raised.

        """
        assert self._thread is not None, "the courier was not sent"
        self._thread.join()
        self._thread = None
        result, error = self._result, self._error
        self._result = self._error = None
        if error is not None:
            raise error
        return result
