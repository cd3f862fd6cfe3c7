"""Measuring: comparisons with what one would use instead, outputs checked before anything is timed."""
