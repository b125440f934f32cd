"""The checks of `neftune-dist doctor`: software, machine, GPUs, and the nodes together."""
