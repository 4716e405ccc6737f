"""ASGI middleware around the application, a file for each concern."""
