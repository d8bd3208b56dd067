"""A program that says more than it is asked for."""

from __future__ import annotations

from squall.conf.suites.programs import Order, serve


def talk(order: Order) -> str:
    """Print a lot, and end if told so."""
    print(*(f"line {number}" for number in range(60)), sep="\n")
    if order["say"] == "end":
        raise ValueError("I have had enough")
    return "said"


if __name__ == "__main__":
    serve(talk)
