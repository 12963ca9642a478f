"""Probes: small models on a large model's features, fitted, compared, and saved without pickle."""

from recipelib.probes.choosing import ProbeChoice, choose_probe
from recipelib.probes.comparison import ProbeAccuracy, compare_probes, cross_validate
from recipelib.probes.probe import KINDS, Probe, fit_probe
from recipelib.probes.saved import load_probe, save_probe

__all__ = [
    "KINDS",
    "Probe",
    "ProbeAccuracy",
    "ProbeChoice",
    "choose_probe",
    "compare_probes",
    "cross_validate",
    "fit_probe",
    "load_probe",
    "save_probe",
]
