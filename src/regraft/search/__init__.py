"""Execution of a rank search, on one or many machines, with every measurement stored before the next round begins."""
