"""Calibration tokens and their sources."""
