"""What is kept from the forward pass for the backward pass? Named, checked policies for `jax.checkpoint`."""
import jax

import names

POLICIES = {
    'none': None,
    'full': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def remat(function, name: str):
  """`function` with the named policy: `none` saves everything, `full` only the inputs, `dots` the matrix products."""
  policy = POLICIES[names.check('remat', name, POLICIES)]
  if policy is None:
    return function
  return jax.checkpoint(function, policy=policy, prevent_cse=False)  # inside a scan CSE cannot undo it
