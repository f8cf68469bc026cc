"""The IO managers of the layers."""
