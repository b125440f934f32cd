"""Sharded training: one contract, two engines."""
