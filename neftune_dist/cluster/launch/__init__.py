"""`neftune-dist launch`: starts the ranks of a run on one node or many, and starts them again."""
