"""Evaluation of what sparsity costs: dense and sparse runs from the same noise, compared by clip and by call."""

from .prompts import read_prompts
from .settings import Setting, grid, parse_setting
from .store import Store
from .study import Study

__all__ = ["Setting", "Store", "Study", "grid", "parse_setting", "read_prompts"]
