"""One harness that measures any model: loss, size, speed, and a sample of its text."""
