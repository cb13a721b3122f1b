"""PRICE: read and interpolate the cost table; measuring it is the work of `bench`."""
