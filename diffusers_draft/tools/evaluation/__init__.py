"""What sparsity costs: the same noise dense and sparse, compared clip by clip and call by call."""

from .prompts import read_prompts
from .settings import Setting, grid, parse_setting
from .store import Store
from .study import Study

__all__ = ["Setting", "Store", "Study", "grid", "parse_setting", "read_prompts"]
