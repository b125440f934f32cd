"""On a cluster: starting a run on its nodes, checking them, and submitting to Slurm."""
