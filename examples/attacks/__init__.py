"""Attacks on the server, one function each, and their common parts."""
