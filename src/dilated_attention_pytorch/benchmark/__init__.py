"""Measurements: what `make bench` prints and stores."""
