"""Suites of ``squall-bench``, at a size that takes seconds: they measure what they say, and clean up."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from squall.conf.suites.columns import _ratio, measure
from squall.conf.suites.links import shaped_pair, why_not

TINY = {"num_classes": 10, "image_size": 28, "in_channels": 1, "num_columns": 2, "width": 0.1}


def test_columns_suite_takes_turns() -> None:
    result = measure(TINY, batch_size=8, num_rounds=1, num_steps=1, links=["loopback"])
    assert [row["strategy"] for row in result.rows] == ["single", "ddp", "column_parallel"]
    assert all(row["images/s"] > 0 for row in result.rows)
    assert result.rows[2]["columns are faster by"] == 1.0
    assert result.figure is not None
    left = [p for p in psutil.Process().children(recursive=True) if "squall.conf.suites.ranks" in " ".join(p.cmdline())]
    assert not left


def test_ratio_is_of_rounds_not_of_medians() -> None:
    seconds = {"column_parallel": [1.0, 2.0, 4.0], "ddp": [2.0, 6.0, 8.0]}
    assert _ratio(seconds, "ddp") == 2.0


@pytest.mark.skipif(bool(why_not()), reason=why_not() or "namespaces can be made")
def test_a_shaped_link_joins_two_hosts_and_is_gone_afterwards() -> None:
    with shaped_pair("100mbit") as link:
        listener = "import socket; s = socket.create_server(('', 7777)); s.settimeout(10); s.accept(); print('met')"
        host = subprocess.Popen([*link.prefixes[0], sys.executable, "-c", listener], stdout=subprocess.PIPE, text=True)
        caller = f"""
import socket, time
for _ in range(100):
    try:
        socket.create_connection(({link.main_address!r}, 7777), 1); break
    except OSError:
        time.sleep(0.05)
"""
        subprocess.run([*link.prefixes[1], sys.executable, "-c", caller], check=True, timeout=15)
        assert host.communicate(timeout=15)[0] == "met\n"
        shown = subprocess.run(
            [*link.prefixes[0], "tc", "qdisc", "show", "dev", "eth0"], capture_output=True, text=True
        )
        assert "tbf" in shown.stdout
        assert "100Mbit" in shown.stdout
        names = {prefix[3] for prefix in link.prefixes}
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert not any(name in listed for name in names)
