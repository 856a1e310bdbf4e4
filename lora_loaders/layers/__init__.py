"""Layers: the module that carries adapters, what each kind of base can do, and the base weight's seam."""
