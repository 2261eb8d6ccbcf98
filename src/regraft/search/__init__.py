"""Running a search: which measurement comes next, on whatever machine, with every one of them on disk before the next begins."""
