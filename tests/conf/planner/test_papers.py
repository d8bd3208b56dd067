"""The planner against published figures; nothing is fitted to them."""

from __future__ import annotations

from pathlib import Path

import pytest

from squall.conf.planner import papers


def test_one_weird_trick_table_1() -> None:
    found = papers.table_1()
    for row, published in papers.TABLE_1.items():
        assert found[row] == pytest.approx(published, rel=0.10), (row, found)
    for num_ranks in (2, 4, 8):  # variable batch size costs a little
        assert 0.95 < found[num_ranks, True] / found[num_ranks, False] < 1.0


def test_the_two_gpus_of_2012_are_a_little_faster_than_one_with_half_the_kernels() -> None:
    two, one = papers.two_gpus_of_2012()
    assert 1.0 < two.images_per_second / one.images_per_second < 1.25
    assert two.fits
    assert one.fits


def test_the_network_of_one_weird_trick_has_its_weights() -> None:
    net = papers.one_tower()
    assert sum(p.numel() for p in net[:13].parameters()) == pytest.approx(2.47e6, rel=0.01)
    assert sum(p.numel() for p in net[13:].parameters()) == pytest.approx(58.6e6, rel=0.01)


def test_figure_3_of_dean() -> None:
    # The paper doesn't say how many examples a step has: fewer gain more, and none gains beyond 16 machines.
    for batch_size, least, most in ((8, 2.2, 4.5), (64, 1.5, 2.2)):
        speech = papers.speech_speedups(batch_size)
        assert least < speech[8] < most
        assert speech[8] < 1.15 * speech[16]
        assert speech[32] < speech[16] < 1.15 * speech[8]
    images = papers.image_speedups(batch_size=16)
    assert images[81] > 12
    assert images[81] > images[16]


def test_the_page_has_this_table() -> None:
    page = Path(__file__).resolve().parents[3] / "docs" / "how-to" / "plan.md"
    assert papers.tables() in page.read_text()
