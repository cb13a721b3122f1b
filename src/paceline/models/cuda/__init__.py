"""What runs the packed forward on CUDA: a paged cache, one attention kernel, captured steps."""
