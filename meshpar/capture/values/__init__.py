"""What a forward asks of the values of tensors: branches, counts, selections."""
