"""The tests, and the check of types at run time that ``--jaxtyping-packages`` names."""

import beartype

_checked = {}


def beartype_once(signature):
  """``beartype.beartype`` for functions without a body, as jaxtyping makes them of signatures.

  A closure is made anew at every call, and beartype writes code for each function: here for one
  of ten, since the others have the signature of one before them.
  """
  key = (
    signature.__module__,
    signature.__qualname__,
    signature.__code__,
    len(signature.__defaults__ or ()),
    *(signature.__kwdefaults__ or ()),
    *signature.__annotations__.items(),
  )
  if key not in _checked:
    _checked[key] = beartype.beartype(signature)
  return _checked[key]
