"""`neftune-dist doctor`: are these machines fit for a run, and what is to be mended if not?"""
