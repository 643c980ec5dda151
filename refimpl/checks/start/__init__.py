"""Checks of the ground floor and of chapter 0."""
