"""Foundations of every run: files, progress, several processes. Knows nothing about SAEs."""
