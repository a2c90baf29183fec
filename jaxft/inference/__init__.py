"""Trained models that answer, and the notebook user's entry."""
