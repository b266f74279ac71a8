"""Data sets, one file each, and the only code that may use the network."""
