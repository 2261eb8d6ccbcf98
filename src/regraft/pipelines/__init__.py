"""Plain functions that compose stages, and the run folder with the results of the stages."""
