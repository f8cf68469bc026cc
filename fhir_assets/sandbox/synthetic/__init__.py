"""The parts of the synthetic population, a module for each domain; `population.py` puts them together."""
