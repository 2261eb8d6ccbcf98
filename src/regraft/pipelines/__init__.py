"""Plain functions that compose stages, and the run folder that keeps what they made."""
