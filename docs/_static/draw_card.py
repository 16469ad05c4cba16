"""Draws `card.png`, which a link to the site shows: `python docs/_static/draw_card.py`."""

import pathlib

import matplotlib.pyplot as plt
import numpy as np

here = pathlib.Path(__file__).parent
figure = plt.figure(figsize=(12, 6.3), dpi=100, facecolor="#2757dd")
axes = figure.add_axes((0.62, 0.12, 0.34, 0.76))
across = np.linspace(-1, 1, 200)
for depth, color in ((1.0, "white"), (0.5, "#ffc857")):
  axes.plot(across * depth, depth * across**2 - depth, color=color, linewidth=7)
axes.plot([0, 0], [-0.5, -1.0], "o", color="white", markersize=16)
axes.axis("off")
figure.text(0.06, 0.62, "jaxbo", color="white", fontsize=76, weight="bold")
figure.text(
  0.06,
  0.3,
  "Bilevel, online, meta and robust\ntraining, as optax transformations",
  color="white",
  fontsize=27,
  linespacing=1.4,
)
figure.savefig(here / "card.png")
