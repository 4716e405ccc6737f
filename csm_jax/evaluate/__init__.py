"""Evaluation of a model's speech: it speaks, judges listen, and a report says how it went."""
