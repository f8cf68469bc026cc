"""A deployment under traffic, kills and outages, for as long as one wants: ``make soak``."""
