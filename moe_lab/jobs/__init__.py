"""Whole pieces of work, importable by the command line, by ranks and by panels."""
