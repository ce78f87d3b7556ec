"""Recorded runs that ship with the project, or come from another machine: out of a store and into one."""
