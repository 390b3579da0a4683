"""Measurements of the scripts, and the results they gave; each module says how to run it."""
