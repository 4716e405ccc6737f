"""What the commands share: flags, output, progress, processes."""
