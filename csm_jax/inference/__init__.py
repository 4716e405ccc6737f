"""Requests, the decode loop and batches, the engine, and the facade above them."""
