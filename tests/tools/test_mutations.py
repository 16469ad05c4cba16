"""The list of mutations fits the sources that they are planted in."""

import pathlib

from tests.tools import mutate


def test_every_mutation_fits_the_sources_and_is_there_once():
  mutations = mutate.load(pathlib.Path(__file__).with_name("mutations.toml"))
  assert len(mutations) >= 60
  assert len(set(mutations)) == len(mutations)
  assert not mutate.misfits(mutations, mutate.ROOT)
