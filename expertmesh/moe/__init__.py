"""One MoE layer over experts that live elsewhere: dispatch plan, exchange, combine. Reads in that order."""
