"""Makes golden/captions.json: scores and tokens of captions by pycocoevalcap 1.2.

  uv run --no-project --isolated --with pycocoevalcap==1.2 --with "setuptools<81" \
    python tests/models/make_golden_captions.py

Not run in CI; it needs Java for METEOR and for the tokens. Captions are random words of a small
vocabulary, so that n-grams meet; images have one to five references.
"""

import json
import pathlib
import random

SENTENCES = [
  "A man's dog doesn't like the beach.",
  'A sign that says "STOP" on it!',
  "Two women (one with an umbrella) are walking; it's raining.",
  "A black-and-white photo of a 3.5-inch disk, isn't it?",
  "the people cannot sit on the bench - it's wet...",
  "A kid in a t-shirt & jeans at 10:30 a.m.",
  "They're gonna eat 1,000 hot dogs -- or maybe 50%.",
  "A red/blue train w/ the number #42 costs $5.",
  "Mr. Smith and Dr. Jones ride the U.S. mail truck.",
  "a fire hydrant.the street is empty",
  "`quoted' and ``double'' words: yes, no",
  "A bowl of [fresh] fruit {and} nuts",
  "I'll say we've seen what you'd want, won't I?",
  "  two   spaces\tand a tab  ",
  "A 2-door car, a half-eaten pizza and an e-mail_address@x.com",
]


def random_captions(rng):
  """``(candidates, references)`` of 40 images."""
  words = ["a", "the", "red", "blue", "dog", "cat", "on", "near", "runs", "sits", "big"]
  sentence = lambda: [rng.choice(words) for _ in range(rng.randint(1, 14))]
  references = [[sentence() for _ in range(rng.randint(1, 5))] for _ in range(40)]
  candidates = []
  for of_image in references:
    base = list(rng.choice(of_image))
    for _ in range(rng.randint(0, 4)):
      base[rng.randrange(len(base))] = rng.choice(words)
    candidates.append(base[: rng.randint(1, 14)])
  return candidates, references


def main():
  """Writes the file."""
  from pycocoevalcap.bleu.bleu import Bleu
  from pycocoevalcap.cider.cider import Cider
  from pycocoevalcap.meteor.meteor import Meteor
  from pycocoevalcap.rouge.rouge import Rouge
  from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

  candidates, references = random_captions(random.Random(0))
  given = {i: [" ".join(tokens)] for i, tokens in enumerate(candidates)}
  right = {i: [" ".join(tokens) for tokens in of_image] for i, of_image in enumerate(references)}
  tokens = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(SENTENCES)})
  meteor = Meteor().compute_score(right, given)
  golden = {
    "candidates": [text for (text,) in given.values()],
    "references": list(right.values()),
    "bleu": Bleu(4).compute_score(right, given, verbose=0)[0],
    "rouge_l": [float(x) for x in Rouge().compute_score(right, given)[1]],
    "cider_d": [float(x) for x in Cider().compute_score(right, given)[1]],
    "meteor": [meteor[0], *meteor[1]],
    "tokens": [[text, tokens[i][0]] for i, text in enumerate(SENTENCES)],
  }
  path = pathlib.Path(__file__).parent / "golden" / "captions.json"
  path.write_text(json.dumps(golden, indent=0) + "\n")


if __name__ == "__main__":
  main()
