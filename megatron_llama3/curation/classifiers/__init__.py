"""Trained classifiers of texts, which the blocks `quality` and `domain` take."""
