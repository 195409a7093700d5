"""See a plan before paying for it."""
from meshpar.planner.hardware import Cluster
from meshpar.planner.transformer import Transformer
