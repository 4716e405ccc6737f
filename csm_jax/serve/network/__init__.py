"""IP addresses, and HTTP requests that the server makes itself."""
