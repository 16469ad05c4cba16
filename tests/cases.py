"""Many cases of one statement in one test."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def cases(names: str | tuple[str, ...], values: Iterable[Any]) -> Callable[[Any], Any]:
  """``pytest.mark.parametrize`` for cases that cost next to nothing: one test runs them all.

  It goes on after a case that fails, and reports all of those. Cases share their fixtures.
  """
  fields = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
  rows = [dict(zip(fields, row if len(fields) > 1 else (row,), strict=True)) for row in values]

  def decorate(test):
    @functools.wraps(test)
    def run_all(*instance, **fixtures):
      failures = []
      for row in rows:
        try:
          test(*instance, **fixtures, **row)
        # What pytest raises where nothing was raised is no Exception.
        except (Exception, pytest.fail.Exception) as error:
          failure = error if isinstance(error, Exception) else AssertionError(str(error))
          failure.add_note(f"in the case {row}")
          failures.append(failure)
      if failures:
        raise ExceptionGroup(f"{len(failures)} of {len(rows)} cases of {test.__name__}", failures)

    signature = inspect.signature(test)
    left = [p for name, p in signature.parameters.items() if name not in fields]
    run_all.__signature__ = signature.replace(parameters=left)  # What pytest looks for fixtures in.
    return run_all

  return decorate
