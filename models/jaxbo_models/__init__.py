"""Flax models for the scripts and tests of jaxbo."""

from jaxbo_models.mlp import MLP

__all__ = ["MLP"]
