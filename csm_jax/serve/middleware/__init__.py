"""ASGI middleware around the application, a module for each concern."""
