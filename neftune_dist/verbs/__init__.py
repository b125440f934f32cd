"""The verbs of the command line, each beside its arguments.

A verb imports its own module only when it runs, so that `--help` and a mistake in a configuration
are answered before torch is loaded.
"""

from neftune_dist.verbs import training  # isort: skip (the order of `--help`)
from neftune_dist.verbs import completion, results
