"""The engines that paceline is timed against: their environments, weights, processes and methods."""
