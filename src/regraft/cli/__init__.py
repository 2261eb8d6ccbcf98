"""The command line: one file for each command, which calls a function of :mod:`regraft.pipelines`."""
