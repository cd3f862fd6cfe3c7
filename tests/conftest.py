"""Triton kernels run in Triton's interpreter where there is no GPU, which must be said before triton is imported."""

from instantas.testing import interpreted

interpreted.prepare()
