"""Write the golden file of exact inner product search; run in an environment with faiss-cpu and numpy.

python data/kvcache_faiss.py tests/kvcache/golden/faiss_flat.npz
"""

import hashlib
import sys

import faiss
import numpy as np

SEED, M, N, D, K = 0, 500, 40, 16, 32

rng = np.random.default_rng(SEED)
keys, queries = (rng.standard_normal((n, D)).astype(np.float32) for n in (M, N))
index = faiss.IndexFlatIP(D)
index.add(keys)
found = index.search(queries, K)[1].astype(np.int64)
digest = hashlib.sha256(keys.tobytes() + queries.tobytes()).hexdigest()
np.savez_compressed(
    sys.argv[1], keys=keys, queries=queries, found=found,
    peer=f"faiss-cpu {faiss.__version__}", seed=SEED, inputs_sha256=digest,
)  # fmt: skip
