"""How may devices that share a row attend to all of it? (kernels/context.py)

`ring`: keys and values travel from device to device while the ones at hand are computed
(kernels/ring.py). `gather`: every device gets all keys and values. `ulysses`: devices exchange
tokens for heads, so that each has all tokens of some heads (Jacobs et al., arXiv:2309.14509).
`ulysses_ring`: as many neighbours as share the key heads evenly do that, and form a ring of groups
(Fang & Zhao, arXiv:2405.07719).
"""

# What attends to the keys of other groups part by part, imported when it runs; None: whoever needs
# them gets them all at once.
STRATEGIES = {
  'ring': 'kernels.ring.attention',
  'gather': None,
  'ulysses': None,
  'ulysses_ring': 'kernels.ring.attention',
}
