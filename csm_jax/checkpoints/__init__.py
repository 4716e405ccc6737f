"""Parameters in files: native checkpoints, int8, adapters, random weights."""
