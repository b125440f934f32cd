"""Watching a run: hangs, and ranks that are slower than the others."""
