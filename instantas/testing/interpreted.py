"""Triton kernels on the CPU: in Triton's interpreter, several times as fast as it comes."""

import contextlib
import functools
import inspect
import os
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch


def prepare() -> None:
    """Without a GPU, switches the interpreter on. To be called before triton is imported."""
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    if os.environ.get("TRITON_INTERPRET") == "1":
        try:
            _remember_builtins()
            _multiply_alike()
        except ImportError:
            pass  # without triton there is nothing to interpret


@contextlib.contextmanager
def multiplying(dtype: torch.dtype) -> Iterator[None]:
    """Matrix products as a GPU makes them of kernels for that dtype.

    The interpreter is given float32 in bfloat16's place (`exact_dtype` in kernels/tiles.py). What a GPU would round to
    bfloat16 in two parts before it multiplies, such as probabilities, is rounded here.
    """
    if dtype != torch.bfloat16 or os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    right = InterpreterBuilder.create_dot

    def rounded(handle):
        data = torch.from_numpy(handle.data)
        high = data.to(dtype).float()
        return TensorHandle((high + (data - high).to(dtype).float()).numpy(), handle.dtype)

    def create_dot(builder, a, b, *others):
        return right(builder, rounded(a), rounded(b), *others)

    with mock.patch.object(InterpreterBuilder, "create_dot", create_dot):
        yield


def _multiply_alike():
    """A row's product does not depend on its place in a tile, as it does not on a GPU.

    BLAS sums rows at a matrix's edge in another order, on some processors. Summed in float64, the digits that are kept
    are the same.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(builder, a, b, d, *others):
        product = np.matmul(a.data, b.data, dtype=np.float64)
        return TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot


def _remember_builtins():
    """The interpreter searches and patches the whole language at every call of a helper: search once, patch a launch.

    It also makes the table of types for every value, and computes whether integers overflow, which nobody reads.
    """
    from triton import language
    from triton.runtime import interpreter

    right, type_of, types = interpreter._patch_lang, interpreter._get_np_dtype, {}

    @functools.cache
    def builtins(package):
        return [name for name, member in inspect.getmembers(package) if language.core.is_builtin(member)]

    @functools.cache
    def languages(function):
        return [value for value in function.__globals__.values() if value is language or value is language.core]

    def patch_builtin(package, builder, *scope):
        for name in builtins(package):
            member = getattr(package, name)
            if language.core.is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, *scope)

    def patch_lang(function):
        if any(language.core.is_builtin(package.load) for package in languages(function)):  # else the kernel did it
            return right(function)

    def get_np_dtype(dtype):
        if dtype.name not in types:
            types[dtype.name] = type_of(dtype)
        return types[dtype.name]

    interpreter._patch_builtin, interpreter._patch_lang = patch_builtin, patch_lang
    interpreter._get_np_dtype = get_np_dtype
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
