"""The captioner in float64 NumPy, a loop over words, and three published cells as in their code.

Nothing here is shared with the model: cells multiply one concatenated vector, as PyTorch's do.
"""

import numpy as np


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def relu(x):
  return np.maximum(x, 0)


def softmax(x):
  e = np.exp(x - x.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


def dense(params, x):
  return x @ np.asarray(params["kernel"]) + np.asarray(params["bias"])


def lstm(params, order, x, h, c, candidate="tanh"):
  """One concatenated product. Inputs whose kernel is narrow go into the last columns alone."""
  n = h.shape[1]
  full = params["recurrent"].shape[1]
  kernels = []
  for name in order:
    kernel = np.zeros((params[name].shape[0], full))
    kernel[:, full - params[name].shape[1] :] = params[name]
    kernels.append(kernel)
  stacked = np.concatenate([*kernels, params["recurrent"]])
  sums = np.concatenate([*x, h], axis=1) @ stacked + params["bias"]
  i, f, o = (sigmoid(sums[:, k * n : (k + 1) * n]) for k in range(3))
  if candidate == "maxout":
    new = np.maximum(sums[:, 3 * n : 4 * n], sums[:, 4 * n :])
  else:
    new = np.tanh(sums[:, 3 * n :])
  c = f * c + i * new
  return o * np.tanh(c), c


def attention(params, query, cells, keys, mask):
  hidden = np.tanh(keys + (query @ params["query"] + params["bias"])[:, None])
  scores = hidden @ params["score"] + params["score_bias"]
  alpha = softmax(np.where(mask, scores, -1e30))
  return np.einsum("bc,bcd->bd", alpha, cells), alpha


def captioner(model, params, features, tokens, cell_mask=None):
  """Logits, attention and guiding vectors of a GuidedCaptioner; ``model`` is read for its flags."""
  batch, length = tokens.shape
  width = model.hidden_dim
  mask = np.ones(features.shape[:2], bool) if cell_mask is None else np.asarray(cell_mask)
  features = np.where(mask[:, :, None], features, 0)
  mean = features.sum(1) / mask.sum(1, keepdims=True)
  cells = relu(dense(params["cells"], features))
  keys = dense(params["keys"], cells)
  f = relu(dense(params["pooled"], mean)) if "pooled" in params else None
  states = np.zeros((4, batch, width))
  if model.init_state == "pooled":
    parts = np.split(
      np.tanh(dense(params["initial"], f)), 4 if model.guide == "sequential" else 2, 1
    )
    states[: len(parts)] = parts
  h, c, v, g = states
  if model.guide == "static":
    v = np.tanh(dense(params["static_guide"], f))
  logits, alphas, guides = [], [], []
  for t in range(length):
    e = relu(params["embedding"][tokens[:, t]])
    if model.guide == "sequential":
      names, x = ["word", "hidden"], [e, h]
      if model.guide_pooled:
        names, x = ["word", "pooled", "hidden"], [e, f, h]
      v, g = lstm(params["guide_lstm"], names, x, v, g)
    scaled = model.guide_scale * v
    query = {"guide": scaled, "hidden": h, "hidden_word": np.concatenate([h, e], 1)}
    z, alpha = attention(params["attention"], query[model.attention_query], cells, keys, mask)
    names, x = [], []
    for name, value in (("word", e), ("guide", scaled), ("context", z)):
      if name in params["decoder_lstm"]:
        names, x = [*names, name], [*x, value]
    h, c = lstm(params["decoder_lstm"], names, x, h, c, model.candidate)
    logits.append(h @ params["output_kernel"] + params["output_bias"])
    alphas.append(alpha)
    guides.append(scaled)
  return np.stack(logits, 1), np.stack(alphas, 1), np.stack(guides, 1)


def caption_losses(logits, tokens, mask):
  """Negative log-probabilities of the tokens after the first, summed in a loop."""
  losses = np.zeros(len(tokens))
  for b in range(len(tokens)):
    for t in range(tokens.shape[1] - 1):
      if mask[b, t + 1]:
        losses[b] -= np.log(softmax(logits[b, t])[tokens[b, t + 1]])
  return losses


# As captioning/models/AttModel.py of ruotianluo/ImageCaptioning.pytorch has them, with its names;
# `linear(p["x2y"], x)` is torch.nn.Linear, whose weight is [outputs, inputs].


def linear(p, x):
  return x @ p["weight"].T + p["bias"]


def torch_attention(p, h, att_feats, p_att_feats):
  att_h = linear(p["h2att"], h)
  dot = np.tanh(p_att_feats + att_h[:, None, :])
  weight = softmax(linear(p["alpha_net"], dot)[:, :, 0])
  return np.einsum("bc,bcd->bd", weight, att_feats)


def att2in2(p, xt, att_feats, p_att_feats, h, c):
  n = h.shape[1]
  att_res = torch_attention(p, h, att_feats, p_att_feats)
  all_input_sums = linear(p["i2h"], xt) + linear(p["h2h"], h)
  sigmoid_chunk = sigmoid(all_input_sums[:, : 3 * n])
  in_gate, forget_gate, out_gate = np.split(sigmoid_chunk, 3, axis=1)
  in_transform = all_input_sums[:, 3 * n :] + linear(p["a2c"], att_res)
  in_transform = np.maximum(in_transform[:, :n], in_transform[:, n:])
  next_c = forget_gate * c + in_gate * in_transform
  return out_gate * np.tanh(next_c), next_c


def att2all2(p, xt, att_feats, p_att_feats, h, c):
  n = h.shape[1]
  att_res = torch_attention(p, h, att_feats, p_att_feats)
  all_input_sums = linear(p["i2h"], xt) + linear(p["h2h"], h) + linear(p["a2h"], att_res)
  sigmoid_chunk = sigmoid(all_input_sums[:, : 3 * n])
  in_gate, forget_gate, out_gate = np.split(sigmoid_chunk, 3, axis=1)
  in_transform = np.maximum(all_input_sums[:, 3 * n : 4 * n], all_input_sums[:, 4 * n :])
  next_c = forget_gate * c + in_gate * in_transform
  return out_gate * np.tanh(next_c), next_c


def torch_lstm_cell(p, x, h, c):
  """torch.nn.LSTMCell: gates input, forget, cell, output."""
  gates = x @ p["weight_ih"].T + p["bias_ih"] + h @ p["weight_hh"].T + p["bias_hh"]
  i, f, g, o = np.split(gates, 4, axis=1)
  c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
  return sigmoid(o) * np.tanh(c), c


def up_down(p, xt, fc_feats, att_feats, p_att_feats, state):
  (h_att, c_att), (h_lang, c_lang) = state
  att_lstm_input = np.concatenate([h_lang, fc_feats, xt], 1)
  h_att, c_att = torch_lstm_cell(p["att_lstm"], att_lstm_input, h_att, c_att)
  att = torch_attention(p, h_att, att_feats, p_att_feats)
  lang_lstm_input = np.concatenate([att, h_att], 1)
  h_lang, c_lang = torch_lstm_cell(p["lang_lstm"], lang_lstm_input, h_lang, c_lang)
  return (h_att, c_att), (h_lang, c_lang)
