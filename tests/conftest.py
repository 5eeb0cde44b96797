"""Settings shared by all tests."""

import torch
from hypothesis import settings

# Examples are fixed, so that a failure can be made again; times vary on a shared machine.
settings.register_profile("samoyeds", derandomize=True, deadline=None, database=None)
settings.load_profile("samoyeds")

# Tests use tiny tensors and run side by side: more threads would only wait for each other.
torch.set_num_threads(1)
