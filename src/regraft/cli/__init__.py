"""The command line: one file a command, each a few lines around a function of :mod:`regraft.pipelines`."""
