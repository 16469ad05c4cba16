"""Draws the gallery's pictures from those of the executed notebooks.

    python docs/tutorials/draw_thumbnails.py docs/jupyter_execute/tutorials

The folder is what a docs build into `docs/_build` leaves of the notebooks that it ran. The pictures
go to `docs/images/tutorials`.
"""

import base64
import io
import json
import pathlib
import sys

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

here = pathlib.Path(__file__).parent
for name, (number, left, right) in CHOSEN.items():
  cells = json.loads((pathlib.Path(sys.argv[1]) / f"{name}.ipynb").read_text())["cells"]
  outputs = [output for cell in cells for output in cell.get("outputs", [])]
  pictures = [
    output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})
  ]
  picture = Image.open(io.BytesIO(base64.b64decode(pictures[number]))).convert("RGB")
  part = picture.crop((int(left * picture.width), 0, int(right * picture.width), picture.height))
  thumbnail = ImageOps.pad(part, SIZE, Image.Resampling.LANCZOS, color="white")
  thumbnail.quantize(256).save(here.parent / f"images/tutorials/{name}.png", optimize=True)
