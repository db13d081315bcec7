"""Chaos as a product: break a mesh on purpose, under load, by a script that can be replayed, and prove what it claims.

Reads in the order script (what is written), schedule (which fault is due), runner (does it, and looks), oracles (what
must hold), report (says so).
"""
