"""Evaluating a model: losses, answers, tasks, a judge, and a chat in the terminal."""
