"""Readable, tested implementations of the systems in *From Memory to Alignment: the executable survey*."""

__version__ = "0.1.0"
