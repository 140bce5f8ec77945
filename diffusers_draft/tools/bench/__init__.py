"""Measurements that a user can repeat: speed of the attention, as ratios taken in one run."""
