"""Mixins: the methods that pipelines and models gain; one generic class each, and diffusers' names for it."""
