"""The backbone, the depth decoder and their sampling: arrays in, arrays out."""
