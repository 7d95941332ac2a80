"""Networks, their weights files, their heads, units and copies."""
