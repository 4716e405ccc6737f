"""Audio that requests carry, decoded, and audio of responses, encoded."""
