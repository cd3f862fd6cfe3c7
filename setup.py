"""Package layout. The metadata is in pyproject.toml."""

from setuptools import setup

# `kernels/` at the top level has no __init__.py, so that it never shadows Hugging Face's `kernels` package; a relative
# symlink instantas/kernels makes it importable as `instantas.kernels` in a checkout, an editable install, a wheel.
setup(
    packages=["instantas", "instantas.kernels", "instantas.demo"],
    package_data={"instantas.demo": ["model/*.json", "model/*/*"]},
    include_package_data=False,
)
