"""What is saved is what is read again; what transformers cannot read is refused.

``sweep.py`` shows that transformers reads it, too.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxbo_models import transformer

from tests.models.test_huggingface import GOLDEN, every_family

pytestmark = pytest.mark.slow  # All together, not each.


@every_family
def test_what_is_saved_is_what_is_read(tmp_path, family):
  model, params = transformer.from_safetensors(GOLDEN / family)
  params = jax.tree.map(lambda leaf: leaf + 0.1, params)
  settings = {"eos_token_id": 7, "hidden_size": 99, "rope_parameters": {"rope_theta": 1.0}}
  transformer.save_safetensors(tmp_path, model, params, settings=settings)
  again, read = transformer.from_safetensors(tmp_path)
  for field in dataclasses.fields(model.config):
    if field.name not in ("num_kv_heads", "ffn_width"):  # Defaults are written out.
      assert getattr(again.config, field.name) == getattr(model.config, field.name), field.name
  jax.tree.map(np.testing.assert_array_equal, read, params)
  written = json.loads((tmp_path / "config.json").read_text())
  assert (written["model_type"], written["eos_token_id"]) == (family, 7)
  original = json.loads((GOLDEN / family / "config.json").read_text())
  transformer.save_safetensors(tmp_path, model, params, settings=original, dtype=jnp.bfloat16)
  again, read = transformer.from_safetensors(tmp_path, param_dtype=jnp.bfloat16)
  half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
  jax.tree.map(np.testing.assert_array_equal, read, half)
  written = json.loads((tmp_path / "config.json").read_text())
  assert written["torch_dtype"] == "bfloat16"
  assert written["pad_token_id"] == original["pad_token_id"]


def test_what_transformers_cannot_read_is_not_saved(tmp_path):
  model, params = transformer.from_safetensors(GOLDEN / "qwen3")

  def refused(message, model=model, params=params, **options):
    with pytest.raises(ValueError, match=message):
      transformer.save_safetensors(tmp_path / "new", model, params, **options)
    assert not (tmp_path / "new").exists()

  refused(r"model_type must be one of \['gpt2', .*\], got 'bloom'", model_type="bloom")
  refused("model must be one that transformers' llama can represent, got", model_type="llama")
  odd = transformer.Transformer(dataclasses.replace(model.config, norm="layer"))
  refused(r"model must be one that transformers' \['gpt2', .*\] can represent", model=odd)
  refused(
    r"params must be those of the model, got \['lora'\]", params=params | {"lora": jnp.ones(2)}
  )
  short = params | {"token_embedding": params["token_embedding"][:-1]}
  refused(r"token_embedding of the shape \(50, 24\), got \(49, 24\)", params=short)
  missing = {name: leaf for name, leaf in params.items() if name != "final_norm"}
  refused(r"params must have final_norm/scale of the shape \(24,\), got none", params=missing)
