"""From text and turns to the frames that the backbone reads."""
