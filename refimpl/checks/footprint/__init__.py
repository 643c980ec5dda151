"""Checks of chapter 1, Memory footprint."""
