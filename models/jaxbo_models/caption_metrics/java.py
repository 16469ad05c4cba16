"""METEOR 1.5 and SPICE, by their Java programs if these are installed."""

import importlib.util
import json
import math
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxbo_models.caption_metrics.ngrams import References, Tokens, check


class JavaScore(NamedTuple):
  """A score, or the reason why the program was skipped.

  Attributes:
    value: the score of the corpus; NaN if skipped.
    per_caption: the score of each caption, ``[n]``; empty if skipped.
    reason: why the program was skipped; empty if it ran.
  """

  value: float
  per_caption: np.ndarray
  reason: str = ""


def meteor(
  candidates: Sequence[Tokens], references: References, *, jar: str | Path | None = None
) -> JavaScore:
  """Computes METEOR 1.5 with English paraphrases by the authors' program, which needs Java.

  The program computes the score of the corpus from summed statistics; the score is not a mean over
  captions.

  Args:
    candidates: the tokens of one caption for each image.
    references: the tokens of one or more correct captions for each image.
    jar: path of ``meteor-1.5.jar``, with ``data/paraphrase-en.gz`` beside it; None for the copy in
      the package pycocoevalcap, if that package is installed.

  Returns:
    The score. If Java or the program is missing or the program fails, the reason instead.

  Raises:
    TypeError: a caption is a string.
    ValueError: there are no images, ``candidates`` and ``references`` differ in length, or an image
      has no reference.

  References:
    Denkowski, Lavie, `Meteor Universal <https://aclanthology.org/W14-3348>`_,
    https://www.cs.cmu.edu/~alavie/METEOR
  """
  check(candidates, references)
  found = _find("METEOR", jar, "meteor/meteor-1.5.jar", ("data/paraphrase-en.gz",))
  if isinstance(found, JavaScore):
    return found
  command = ["java", "-Xmx2G", "-jar", str(found), "-", "-", "-stdio", "-l", "en", "-norm"]
  score_lines = [
    " ||| ".join(["SCORE", *map(_text, of_image), _text(candidate)])
    for candidate, of_image in zip(candidates, references, strict=True)
  ]
  try:
    statistics = _run(command, found.parent, score_lines)
    values = _run(command, found.parent, [" ||| ".join(["EVAL", *statistics])])
    *per_caption, value = map(float, values)
  except (OSError, ValueError, subprocess.SubprocessError) as error:
    return _skipped(f"METEOR was skipped: {error}")
  if len(statistics) != len(candidates) or len(per_caption) != len(candidates):
    return _skipped(f"METEOR was skipped: {found} gave {len(values)} numbers")
  return JavaScore(value, np.array(per_caption))


def spice(
  candidates: Sequence[Tokens], references: References, *, jar: str | Path | None = None
) -> JavaScore:
  """Computes SPICE, the agreement of scene graphs, by the authors' program for Java 8 or 11.

  Args:
    candidates: the tokens of one caption for each image.
    references: the tokens of one or more correct captions for each image.
    jar: path of ``spice-1.0.jar``. The folder ``lib/`` beside it must contain Stanford CoreNLP
      3.6.0 (``stanford-corenlp-3.6.0.jar`` and ``stanford-corenlp-3.6.0-models.jar``); nothing is
      downloaded. None for the copy in the package pycocoevalcap, if that package is installed.

  Returns:
    The mean F score. If Java or the program is missing or the program fails, the reason instead.

  Raises:
    TypeError: a caption is a string.
    ValueError: there are no images, ``candidates`` and ``references`` differ in length, or an image
      has no reference.

  References:
    Anderson et al., `SPICE: Semantic Propositional Image Caption Evaluation
    <https://arxiv.org/abs/1607.08822>`_, https://panderson.me/spice
  """
  check(candidates, references)
  models = ("lib/stanford-corenlp-3.6.0.jar", "lib/stanford-corenlp-3.6.0-models.jar")
  found = _find("SPICE", jar, "spice/spice-1.0.jar", models)
  if isinstance(found, JavaScore):
    return found
  images = [
    {"image_id": i, "test": _text(candidate), "refs": [_text(r) for r in of_image]}
    for i, (candidate, of_image) in enumerate(zip(candidates, references, strict=True))
  ]
  with tempfile.TemporaryDirectory() as folder:
    given, written = Path(folder) / "in.json", Path(folder) / "out.json"
    given.write_text(json.dumps(images))
    command = ["java", "-Xmx8G", "-jar", str(found), str(given)]
    try:
      _run([*command, "-out", str(written), "-subset", "-silent"], found.parent, [])
      results = json.loads(written.read_text())
      scores = {result["image_id"]: result["scores"]["All"]["f"] for result in results}
      per_caption = np.array([float(scores[i]) for i in range(len(images))])
    except (OSError, ValueError, subprocess.SubprocessError) as error:
      return _skipped(f"SPICE was skipped: {error}")
    except (KeyError, TypeError) as error:
      return _skipped(f"SPICE was skipped: {found} did not give a score for each image: {error!r}")
  return JavaScore(float(np.mean(per_caption)), per_caption)


def _find(
  name: str, jar: str | Path | None, in_package: str, beside: Sequence[str]
) -> Path | JavaScore:
  """Returns the path of the program, or the reason why it cannot run."""
  if shutil.which("java") is None:
    return _skipped(f"{name} was skipped: there is no java")
  if jar is None:
    package = importlib.util.find_spec("pycocoevalcap")
    if package is None or not package.submodule_search_locations:
      return _skipped(
        f"{name} was skipped: give {Path(in_package).name} as jar, or install pycocoevalcap"
      )
    jar = Path(package.submodule_search_locations[0]) / in_package
  path = Path(jar).absolute()
  for file in (path, *(path.parent / other for other in beside)):
    if not file.exists():
      return _skipped(f"{name} was skipped: there is no {file}")
  return path


def _run(command: Sequence[str], folder: Path, lines: Sequence[str]) -> list[str]:
  """Runs a program on lines of text and returns the lines of its output."""
  given = "".join(line + "\n" for line in lines)
  done = subprocess.run(
    command, cwd=folder, input=given, capture_output=True, text=True, check=True, encoding="utf-8"
  )
  return done.stdout.splitlines()


def _text(tokens: Tokens) -> str:
  """Joins tokens with spaces; ``|||`` separates captions and a line break ends them: both go."""
  return " ".join(" ".join(map(str, tokens)).replace("|||", "").split())


def _skipped(reason: str) -> JavaScore:
  return JavaScore(math.nan, np.zeros(0), reason)
