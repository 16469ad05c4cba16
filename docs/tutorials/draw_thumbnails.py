"""Draws the gallery's pictures from those of the notebooks that a docs build has run.

    uv run --extra docs python docs/tutorials/draw_thumbnails.py

The build keeps them in `docs/.jupyter_cache`. The pictures go to `docs/images/tutorials`.
"""

import base64
import io
import pathlib

import jupyter_cache
from PIL import Image, ImageOps

SIZE = 480, 320
# Which of a notebook's pictures, and which part of its width.
CHOSEN = {
  "1_responses": (1, 0, 0.49),
  "2_hyper_cleaning": (1, 0, 1),
  "3_many_minima": (0, 0, 1),
  "4_online": (1, 0.52, 1),
  "5_robust": (1, 0.68, 1),
  "6_few_shot": (0, 0, 1),
  "7_language_models": (0, 0.69, 1),
  "8_many_devices": (0, 0, 1),
}

docs = pathlib.Path(__file__).parent.parent
cache = jupyter_cache.get_cache(docs / ".jupyter_cache")
records = sorted(cache.list_cache_records(), key=lambda record: record.pk)
newest = {pathlib.Path(record.uri).stem: record.pk for record in records}
for name, (number, left, right) in CHOSEN.items():
  cells = cache.get_cache_bundle(newest[name]).nb.cells
  outputs = [output for cell in cells for output in cell.get("outputs", [])]
  pictures = [
    output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})
  ]
  picture = Image.open(io.BytesIO(base64.b64decode(pictures[number]))).convert("RGB")
  part = picture.crop((int(left * picture.width), 0, int(right * picture.width), picture.height))
  thumbnail = ImageOps.pad(part, SIZE, Image.Resampling.LANCZOS, color="white")
  thumbnail.quantize(256).save(docs / f"images/tutorials/{name}.png", optimize=True)
