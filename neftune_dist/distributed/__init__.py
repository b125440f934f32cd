"""What the processes of a run say to each other: ranks, agreement, hangs and how they ended."""
