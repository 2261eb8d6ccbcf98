"""The studio: a local page that lists runs, starts and stops them, and lets two models answer one prompt."""
