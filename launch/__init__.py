"""Turns a config and a machine into a run: the commands and the files that launchers read."""
