"""Mistakes that a reader of "Where do the bytes go?" may make, and the right answers."""

from math import prod


def adamw_bytes(shapes, itemsize):
    return sum(2 * prod(shape) * itemsize + 4 for shape in shapes)


def storage_bytes(tensors):
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def llama_layer_bytes(B, T, d, F, H, G, D):
    return 4 * B * T * (6 * d + 2 * H * D + 2 * G * D + 4 * F + H + 2)


def mixed_saving(weight, grad, master, moments):
    return 16 - (weight + grad + master + moments), (4 + 4) / 2


SOLUTIONS = {
    "adamw_bytes": adamw_bytes,
    "storage_bytes": storage_bytes,
    "llama_layer_bytes": llama_layer_bytes,
    "mixed_saving": mixed_saving,
}


def _each_element_once(tensors):
    return sum(t.untyped_storage().nbytes() for t in tensors)


def _views_by_their_elements(tensors):
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


MUTANTS = [
    ("adamw_bytes", "the step counts are forgotten", lambda shapes, w: sum(2 * prod(s) * w for s in shapes)),
    ("adamw_bytes", "one moment", lambda shapes, w: sum(prod(s) * w for s in shapes)),
    ("adamw_bytes", "one step count for all tensors",
     lambda shapes, w: 4 + sum(2 * prod(s) * w for s in shapes)),
    ("adamw_bytes", "moments always in float32", lambda shapes, w: adamw_bytes(shapes, 4)),
    ("adamw_bytes", "the step count in the dtype of the parameter",
     lambda shapes, w: sum(2 * prod(s) * w + w for s in shapes)),
    ("adamw_bytes", "switched off: no states", lambda shapes, w: 0),
    ("storage_bytes", "the sum of nbytes", lambda tensors: sum(t.nbytes for t in tensors)),
    ("storage_bytes", "storages are not counted once", _each_element_once),
    ("storage_bytes", "a slice counts its own elements only", _views_by_their_elements),
    ("storage_bytes", "four bytes for every element",
     lambda tensors: sum({t.untyped_storage().data_ptr(): 4 * t.untyped_storage().nbytes() // t.itemsize
                          for t in tensors}.values())),
    ("llama_layer_bytes", "elements instead of bytes", lambda *sizes: llama_layer_bytes(*sizes) // 4),
    ("llama_layer_bytes", "as many key-value heads as query heads",
     lambda B, T, d, F, H, G, D: llama_layer_bytes(B, T, d, F, H, H, D)),
    ("llama_layer_bytes", "the log-sums of attention are forgotten",
     lambda B, T, d, F, H, G, D: llama_layer_bytes(B, T, d, F, 0, G, D) + 8 * B * T * H * D),
    ("llama_layer_bytes", "the statistics of the norms are forgotten",
     lambda B, T, *sizes: llama_layer_bytes(B, T, *sizes) - 8 * B * T),
    ("llama_layer_bytes", "eager attention",
     lambda B, T, d, F, H, G, D: 4 * B * T * (6 * d + 4 * H * D + 4 * F + H * T + 2)),
    ("mixed_saving", "the master copy is forgotten",
     lambda weight, grad, master, moments: (16 - weight - grad - moments, 4.0)),
    ("mixed_saving", "weights and gradients only",
     lambda weight, grad, master, moments: (8 - weight - grad - master, 4.0)),
    ("mixed_saving", "the sign is the other way round",
     lambda weight, grad, master, moments: (weight + grad + master + moments - 16, 4.0)),
    ("mixed_saving", "Eq. 2 is taken for the truth", lambda weight, grad, master, moments: (4, 4.0)),
    ("mixed_saving", "Eq. 2 halves the regime's own bytes",
     lambda weight, grad, master, moments: (16 - weight - grad - master - moments, (weight + grad) / 2)),
]  # fmt: skip
