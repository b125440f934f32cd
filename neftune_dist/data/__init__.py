"""From rows to micro-batches: read, render, tokenise once, sample by law 4, pack and collate."""
