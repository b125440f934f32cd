"""Documents: read, templated, tokenised once, scheduled by law 4 and laid out over ranks."""
