"""The demonstration: the whole loop on one machine, with the real server, the real SDK and real data."""
