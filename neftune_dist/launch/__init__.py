"""Starting a run's processes on one node or many, and looking after the run."""
