"""The JAXopt program of `docs/coming_from.md` and the one of jaxbo beside it give one gradient."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

PAGE = Path(__file__).parents[2] / "docs/coming_from.md"


@pytest.mark.filterwarnings("ignore")  # of JAXopt, which is not maintained
def test_the_programs_of_jaxopt_and_jaxbo_agree():
  pytest.importorskip("jaxopt")
  section = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1]
  blocks = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
  assert section.startswith("JAXopt")
  assert len(blocks) == 2
  normal = np.random.default_rng(0).normal
  train, val = (
    (jnp.asarray(normal(size=(20, 4)), jnp.float32), jnp.asarray(normal(size=20), jnp.float32))
    for _ in range(2)
  )
  found = []
  for block in blocks:
    program: dict = {}
    exec(block, program)
    gradient = jax.jit(program["hypergradient"])
    found.append(float(gradient(jnp.float32(-2.0), jnp.zeros(4), train, val)))
  assert abs(found[0]) > 1e-3
  assert found[1] == pytest.approx(found[0], rel=0.01)  # JAXopt stops at a tolerance
