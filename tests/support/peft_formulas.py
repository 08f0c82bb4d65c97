"""What PEFT makes of a folder's files, in float64 NumPy on torch's tensors: a formula for the tensors of each form."""

import re

import numpy as np

from lowrank.adapters.peft import match

PREFIX = "base_model.model."


def merged(config, tensors, weights):
    """The base's tensors `{name: array}` with the adapter merged into them."""
    out = {name: x.astype(np.float64) for name, x in weights.items()}
    modules = {}
    shared = {k.removeprefix("base_model."): np.float64(x) for k, x in tensors.items() if k.count(".") == 1}
    for key, x in tensors.items():
        found = re.fullmatch(rf"{re.escape(PREFIX)}(.*)\.(({'|'.join(FORMULAS)})\S*)", key)
        if found:
            path, suffix, kind = found.groups()
            modules.setdefault((path, kind), {})[suffix.removesuffix(".weight")] = np.float64(x)
    for (path, kind), parts in modules.items():
        FORMULAS[kind](config, path, {**parts, "shared": shared} if shared else parts, out)
    plain = {k.removeprefix(PREFIX).replace(".base_layer", ""): x for k, x in tensors.items() if k.endswith("bias")}
    return out | plain


def _lora(config, path, parts, out):
    if "lora_E" in parts:  # AdaLoRA
        scale = config["lora_alpha"] / (config["init_r"] + 1e-5)
        out[f"{path}.weight"] += scale * (parts["lora_B"] * parts["lora_E"][:, 0]) @ parts["lora_A"]
        return
    rank = match.pattern_value(config["rank_pattern"], path, config["r"])
    alpha = match.pattern_value(config["alpha_pattern"], path, config["lora_alpha"])
    scale = alpha / (rank**0.5 if config["use_rslora"] else rank)
    assert parts["lora_A"].shape[0] == rank
    name = f"{path}.weight"
    out[name] += scale * parts["lora_B"] @ parts["lora_A"]
    if "lora_magnitude_vector" in parts:
        out[name] *= (parts["lora_magnitude_vector"] / np.linalg.norm(out[name], axis=1))[:, None]


def _ia3(config, path, parts, out):
    out[f"{path}.weight"] *= parts["ia3_l"]
    if parts["ia3_l"].shape[1] == 1 and f"{path}.bias" in out:
        out[f"{path}.bias"] *= parts["ia3_l"][:, 0]


def _rank_and_scale(config, path):
    rank = match.pattern_value(config["rank_pattern"], path, config["r"])
    return rank, match.pattern_value(config["alpha_pattern"], path, config["alpha"]) / rank


def _loha(config, path, parts, out):
    rank, scale = _rank_and_scale(config, path)
    w1, w2 = (parts[f"hada_w{i}_a"] @ parts[f"hada_w{i}_b"] for i in (1, 2))
    assert parts["hada_w1_b"].shape[0] == rank
    out[f"{path}.weight"] += scale * w1 * w2


def _lokr(config, path, parts, out):
    rank, scale = _rank_and_scale(config, path)
    w1, w2 = (
        parts[f"lokr_w{i}"] if f"lokr_w{i}" in parts else parts[f"lokr_w{i}_a"] @ parts[f"lokr_w{i}_b"] for i in (1, 2)
    )
    assert all(x.shape[0] == rank for name, x in parts.items() if name.endswith("_b"))
    out[f"{path}.weight"] += scale * np.kron(w1, w2)


def _hira(config, path, parts, out):
    assert parts["hira_A"].shape[0] == config["r"]
    out[f"{path}.weight"] *= 1 + parts["hira_B"] @ parts["hira_A"]


def _vera(config, path, parts, out):
    (n_out, n_in), rank = out[f"{path}.weight"].shape, config["r"]
    assert parts["vera_lambda_d"].shape == (rank,)
    a, b = parts["shared"]["vera_A"][:, :n_in], parts["shared"]["vera_B"][:n_out]
    out[f"{path}.weight"] += parts["vera_lambda_b"][:, None] * (b @ (parts["vera_lambda_d"][:, None] * a))


def _blocks(q, series):
    """PEFT's rotation of skew-symmetric blocks: its series, or its exact transform, which turns the other way."""
    eye = np.eye(q.shape[-1])
    return eye + 2 * (q + q @ q + q @ q @ q) + q @ q @ q @ q if series else (eye - q) @ np.linalg.inv(eye + q)


def _diagonal(blocks):
    out = np.zeros((len(blocks) * blocks.shape[-1],) * 2)
    for i, block in enumerate(blocks):
        at = slice(i * len(block), (i + 1) * len(block))
        out[at, at] = block
    return out


def _oft(config, path, parts, out):
    n_in = out[f"{path}.weight"].shape[1]
    b = config["oft_block_size"] or n_in // config["r"]
    q = np.zeros((len(parts["oft_R"]), b, b))
    q[:, *np.triu_indices(b, 1)] = parts["oft_R"]
    assert config["num_cayley_neumann_terms"] == 5
    r = _diagonal(np.resize(_blocks(q - q.swapaxes(1, 2), config["use_cayley_neumann"]), (n_in // b, b, b)))
    out[f"{path}.weight"] = out[f"{path}.weight"] @ r.T


def _boft(config, path, parts, out):
    """Factor i: the halves of blocks in an order that puts every `2^i`-th of `2^(i + 1)` neighbors together."""
    (factors, _, b, _), n_in = parts["boft_R"].shape, out[f"{path}.weight"].shape[1]
    assert factors == config["boft_n_butterfly_factor"]
    halves, r = np.arange(n_in).reshape(-1, b // 2 or 1), np.eye(n_in)
    for i, data in enumerate(parts["boft_R"]):
        order = (
            halves.reshape(-1, 2, 2**i, halves.shape[1]).swapaxes(1, 2).reshape(-1) if factors > 1 else np.arange(n_in)
        )
        factor = np.zeros((n_in, n_in))
        factor[np.ix_(order, order)] = _diagonal(_blocks((data - data.swapaxes(1, 2)) / 2, False))
        r = factor @ r
    out[f"{path}.weight"] = out[f"{path}.weight"] @ r.T * parts["boft_s"]


FORMULAS = {
    "lora_": _lora,
    "ia3_l": _ia3,
    "hada_": _loha,
    "lokr_": _lokr,
    "hira_": _hira,
    "vera_": _vera,
    "oft_": _oft,
    "boft_": _boft,
}
