"""The parts of the synthetic population, one module for each domain. ``population.py`` combines them."""
