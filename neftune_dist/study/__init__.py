"""`neftune-dist study`: paired runs that differ in alpha alone, and what they show."""
