"""What ``squall-bench`` can measure: a module a suite, and what they share (links between hosts, ranks to time on)."""
