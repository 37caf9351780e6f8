"""What cannot be read."""


class UnreadableImageError(ValueError):
    """A file that is not a picture we can read: broken, a decompression bomb, of another type."""
