"""The operating system: files, process trees, memory limits and the console. Imports no torch."""
