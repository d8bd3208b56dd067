"""Every answer to where, when and which with every other: each pair trains, or says clearly why not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.ranks import run

from .pairs import CLEAR, CODECS, MASKED_CODECS, NUM_RANKS, PAIRS, WHEN, WHERE, WHICH, ask, seen_pairs, train
from .table import WORKS, first_words

_NO_ARGUMENT = "unexpected keyword argument "


def _expected(where: str, when: str, which: str, codec: str) -> str | None:
    """The error that a pair ends with; a pair that begins to work, or fails otherwise, is seen here."""
    plain = (where, which, codec) == ("whole", "all weights", "fp32")
    if when in ("Hogwild", "Sandblaster"):
        return None if plain else _NO_ARGUMENT
    if when == "Downpour":
        if where in ("tiles", "hybrid"):
            return _NO_ARGUMENT
        if where == "columns" and which != "all weights":
            return "masks are of whole replicas so far" if codec == "fp32" else "columns write their parts of a push"
        if where == "columns":
            return None if codec == "fp32" else "columns write their parts of a push"
        return None if which in ("all weights", "Static") else "can't move masks so far"
    if where in ("columns", "hybrid") and which == "DeepCompression":
        return "DeepCompression lets the weights of a whole layer share values"
    if where in ("columns", "tiles") and codec != "fp32":
        return "CodecHook needs gradients that DistributedDataParallel averages"
    return None


def _verdict(where: str, when: str, which: str, codec: str, path: Path) -> str:
    expected = _expected(where, when, which, codec)
    try:
        ask(where, when, which, codec)
    except CLEAR as error:
        outcomes: list[object] = [str(error)]
    else:
        outcomes = run(NUM_RANKS, train, where, when, which, codec, str(path), lightning=True, timeout=60)
    first = outcomes[0]
    if isinstance(first, str):
        assert expected is not None, f"with {codec}: {first}"
        assert all(isinstance(other, str) for other in outcomes)
        found = re.search(re.escape(expected), first)
        assert found, f"with {codec}, another error: {first}"
        if expected == _NO_ARGUMENT:
            return f"no argument `{first[found.end() :].strip(chr(39))}`"
        return f"clear error: {first_words(first[found.start() :])}"
    assert expected is None, f"works with {codec}; expected: {expected}"
    for other in outcomes[1:]:
        for kind in ("weights", "masks"):
            ours, theirs = first[kind], other[kind]  # type: ignore[index]
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours), f"ranks part, with {codec}"
    return WORKS


@pytest.mark.asynchronous
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("where", WHERE)
def test_pair(where: str, when: str, which: str, tmp_path: Path) -> None:
    row = f"{where}, {when}"
    seen_pairs[row, which] = "FAILS"
    codecs = CODECS if which == "all weights" else MASKED_CODECS
    verdicts = {codec: _verdict(where, when, which, codec, tmp_path) for codec in codecs}
    plain = verdicts.pop("fp32")
    coded = set(verdicts.values())
    if plain == WORKS and coded == {WORKS}:
        seen_pairs[row, which] = f"{WORKS}, with codecs"
    elif coded == {plain}:
        seen_pairs[row, which] = plain
    elif plain == WORKS and len(coded) == 1:
        seen_pairs[row, which] = f"{WORKS}; with a codec, {coded.pop()}"
    else:
        assert plain != WORKS, verdicts
        seen_pairs[row, which] = plain


def test_the_page_shows_what_was_seen(request: pytest.FixtureRequest) -> None:
    """Comes last: the page's table is the one that this run saw (``--update-conformance`` writes it)."""
    PAIRS.check(seen_pairs, request.config.getoption("--update-conformance", default=False))
