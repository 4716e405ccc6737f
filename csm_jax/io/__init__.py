"""Audio files, files that are written whole or not at all, and conversations as JSON."""
