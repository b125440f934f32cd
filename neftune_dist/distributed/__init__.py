"""Communication between the processes of a run: ranks, agreement, hangs, outcomes."""
