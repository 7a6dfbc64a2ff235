"""Offline quantisation: models on disk, calibrated and rounded a layer at a time."""
