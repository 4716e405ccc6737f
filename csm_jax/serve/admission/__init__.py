"""Admission: who sends a request, and how much work the server takes on for them."""
