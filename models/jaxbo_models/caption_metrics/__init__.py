"""Scores of captions in NumPy, as on the COCO server: BLEU, ROUGE-L, CIDEr-D and exact match.

The scores take tokens, which may be words or ids. :func:`tokenize` splits English text into tokens.
METEOR and SPICE are Java programs; :func:`meteor` and :func:`spice` run them if they are installed.

>>> from jaxbo_models import caption_metrics
>>> candidates = [caption_metrics.tokenize("A dog runs on the beach.")]
>>> references = [[caption_metrics.tokenize(text) for text in (
...   "A dog is running on the beach.", "A brown dog runs along a beach.")]]
>>> print(caption_metrics.bleu(candidates, references).round(3))
[0.846 0.757 0.495 0.   ]
>>> print(caption_metrics.rouge_l(candidates, references).round(3))
[0.759]
"""

from jaxbo_models.caption_metrics.bleu import bleu
from jaxbo_models.caption_metrics.cider import CiderD, DocumentFrequencies, cider_d
from jaxbo_models.caption_metrics.java import JavaScore, meteor, spice
from jaxbo_models.caption_metrics.rouge import rouge_l
from jaxbo_models.caption_metrics.summary import exact_match, summary
from jaxbo_models.caption_metrics.tokenization import tokenize

__all__ = [
  "CiderD",
  "DocumentFrequencies",
  "JavaScore",
  "bleu",
  "cider_d",
  "exact_match",
  "meteor",
  "rouge_l",
  "spice",
  "summary",
  "tokenize",
]
