"""Integrations: the seams to diffusers, and nothing else of the package knows them."""
