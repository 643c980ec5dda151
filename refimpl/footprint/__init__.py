"""Memory footprint accounting (survey Eq. 1 and Eq. 2): predict every byte of a run, then measure it."""

from refimpl.footprint.arch import Arch, Run

__all__ = ["Arch", "Run"]
