"""Phases of training that methods share, and the Lightning parts around them."""
