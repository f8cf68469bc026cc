"""The asset checks of windows and of whole tables."""
