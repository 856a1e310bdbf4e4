"""Tuning: configurations of new adapters, target matching and initialisation."""
