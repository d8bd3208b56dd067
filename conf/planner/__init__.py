"""The planner: what a training step takes under each Strategy, on machines that are here or that are not.

``recorder`` and ``steps`` record what one rank does, from the Strategies' own placement; ``devices`` and ``links`` say
what its operations and messages take, ``timeline`` plays them, and ``predictions`` compares and recommends.
``calibration`` measures this machine; ``clusters`` reads others from YAML.
``simulation`` plays whole runs, event by event.
"""
