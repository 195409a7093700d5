"""Parameters and gradients as they lie on the ranks, and numbers of them."""
