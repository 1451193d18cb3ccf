"""A checkpoint on the disk: what is in its files, and how it is read and written."""
