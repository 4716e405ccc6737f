"""The routes, a module for each API, and what several of them need."""
