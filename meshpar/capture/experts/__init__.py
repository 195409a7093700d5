"""Experts: routing-dependent code becomes `dispatch`, `grouped_mm` and `combine` while a model is captured."""
