"""Types are checked at run time in all tests, each closure by its own annotations."""

import jaxtyping
import pytest

import tests


def made(kind, default):
  """A closure of a type; all have one name in the source."""

  @jaxtyping.jaxtyped(typechecker=tests.beartype_once)
  def given(x: kind, y: kind = default) -> kind:
    return x if y is default else y

  return given


@pytest.mark.parametrize("again", [False, True])
def test_a_closure_is_checked_by_its_own_types(again):
  for kind, right, wrong in ((int, 1, "a"), (str, "a", 1)):
    given = made(kind, right * 2 if again else right)
    assert given(right) == given(x=right) == right
    for arguments in ((wrong,), (right, wrong)):
      with pytest.raises(jaxtyping.TypeCheckError, match="checking the parameters"):
        given(*arguments)


def test_a_signature_that_was_checked_before_makes_nothing_new():
  made(float, 1.0)
  before = dict(tests._checked)
  made(float, 2.0)
  assert tests._checked == before
