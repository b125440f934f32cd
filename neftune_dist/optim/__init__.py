"""AdamW, the precision of its moments, and the learning rate."""
