"""Texts as words, and words as hashes."""
