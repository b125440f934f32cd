"""What launcher/submit.py is made of: all that a login node can check and keep, without torch."""
