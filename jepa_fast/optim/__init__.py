"""Optimisation: parameter groups."""
