"""Decoding a gradient and stepping an optimizer with it in one pass: the function that shards call, and the kernel."""

from .function import CODECS, Step, shard_update

__all__ = ["CODECS", "Step", "shard_update"]
