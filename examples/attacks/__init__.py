"""Attacks on a server of this project, each a function, and what they share."""
