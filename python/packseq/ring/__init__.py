"""Sequences spread over several ranks."""
