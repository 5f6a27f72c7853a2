"""The faults, in one table: passes with one bug each, and the site that the runner must blame for it."""

from __future__ import annotations

from tests.passes import faults_of_packing, faults_of_training, faults_of_wiring
from tests.passes.sabotage import FAULTS, MISSES

MODULES = (faults_of_packing, faults_of_training, faults_of_wiring)

__all__ = ["FAULTS", "MISSES", "MODULES"]
