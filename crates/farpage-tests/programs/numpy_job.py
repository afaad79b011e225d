"""Sorts and multiplies arrays of SIZE_MIB (the only argument) and prints what came of it."""

import hashlib
import sys

import numpy as np

size = int(sys.argv[1]) << 20
rng = np.random.default_rng(7)

a = rng.integers(0, 1 << 40, size // 8, dtype=np.int64)
total = int(a.sum())
a.sort()
assert (a[1:] >= a[:-1]).all()
assert int(a.sum()) == total
print("sorted", total, hashlib.sha256(a.view(np.uint8)).hexdigest())
del a

# Small whole numbers: the products are exact in any order of addition.
n = int((size / 3 / 8) ** 0.5)
x = rng.integers(-8, 8, (n, n)).astype(np.float64)
y = rng.integers(-8, 8, (n, n)).astype(np.float64)
z = x @ y
v = rng.integers(-8, 8, n).astype(np.float64)
assert (z @ v == x @ (y @ v)).all()
print("multiplied", n, int(z.sum()), hashlib.sha256(z.view(np.uint8)).hexdigest())
