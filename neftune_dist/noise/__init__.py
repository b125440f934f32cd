"""NEFTune's noise: its law, its counter-based stream and the hook that adds it."""
