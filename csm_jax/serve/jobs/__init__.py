"""Requests that run without their client, and the webhooks that report their results."""
