"""A method whose cells of seed 1 kill their process, for the test of a cluster's workers."""

import dataclasses
import os
from typing import Any

import torch

from moslora.comparison.methods import METHODS


def die_of_seed_one(model: Any) -> None:
    """Kill the process without a word if the cell was seeded with 1."""
    if torch.initial_seed() == 1:
        os._exit(9)


METHOD = dataclasses.replace(METHODS["moslora"], adjust=die_of_seed_one)
