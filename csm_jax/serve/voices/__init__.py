"""The voices that requests can name, and where they come from."""
