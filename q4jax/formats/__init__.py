"""File formats, read and written without knowing any model."""
