"""Attention in jax's own operations, by other libraries, and over devices."""
