"""Adapters made from adapters or from weights: resized, merged, extracted, turned into another algebra; all on ΔW."""
