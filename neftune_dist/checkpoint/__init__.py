"""Checkpoints: flat shards of any engine, published whole or not at all."""
