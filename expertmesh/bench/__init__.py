"""Benches that anyone can run: each measures its baselines in the same run, alternating, and says what it ran on."""
