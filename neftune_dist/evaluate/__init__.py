"""Evaluation, noise off: held-out loss under an engine or alone, generation, exact match."""
