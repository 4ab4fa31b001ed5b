"""Measurements and checks of the generated kernels, run as files from a checkout; see each file's docstring."""
