"""Doubles and oracles that ship with the package, for its own tests and for those who build on it.

The product never imports this. Each double keeps the contract of what it stands for, checked by the same tests.
"""
