"""Where in its text the voice is: word times from the attention of a few heads."""
