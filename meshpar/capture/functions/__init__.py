"""autograd.Functions: their own backwards are kept, with what is proved of them."""
