"""Functions that masks and scores may use besides operators; each also works on numbers and tensors."""

from .arch.elementwise import absolute, exp, load, maximum, minimum, tanh, to_float, where

__all__ = ["absolute", "exp", "load", "maximum", "minimum", "tanh", "to_float", "where"]
