"""Words and when they are spoken, from the attention of the frames to the text."""
