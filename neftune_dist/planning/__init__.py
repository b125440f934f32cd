"""`neftune-dist plan`: memory, batches and disk of a run, without a GPU."""
