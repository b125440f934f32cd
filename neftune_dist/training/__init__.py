"""A training run: what it is made of, its loop, its metrics."""
