"""Evaluation: arrays in, numbers out; the protocol's name stands beside every number."""
