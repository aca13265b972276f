"""Meta's folders."""
