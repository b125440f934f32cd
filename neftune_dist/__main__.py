"""`python -m neftune_dist VERB`."""

from neftune_dist.cli import run

run()
