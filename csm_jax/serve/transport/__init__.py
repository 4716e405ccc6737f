"""The HTTP server: sockets, connections and their limits, around uvicorn."""
