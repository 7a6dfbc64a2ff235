"""Quantisation-aware training: a model that learns under the rounding it will be stored with."""
