"""The packed forward on CUDA: a paged cache, one attention kernel, captured steps."""
