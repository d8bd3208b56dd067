"""Sandblaster L-BFGS (Dean et al. 2012, 4.2): vectors that stay on their shards, portions, and who drives it all."""
