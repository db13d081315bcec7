"""Routing traces: record which experts fired, make up such loads, simulate the control plane on them, replay them.

Reads in the order format, recorder, synthetic, simulate, replay.
"""
