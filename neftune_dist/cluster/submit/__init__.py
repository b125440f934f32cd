"""Checks on a login node before a job is submitted. Imports no torch."""
