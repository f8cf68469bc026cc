"""The asset checks of windows and of tables."""
