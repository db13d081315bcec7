"""Generated from protos/ by generate.py. Do not edit."""
