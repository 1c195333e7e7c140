"""What all tests share."""

import torch
from hypothesis import settings

# The models here are so small that more threads only wait for each other.
torch.set_num_threads(1)

settings.register_profile("untimed", deadline=None)  # a busy machine is no fault
settings.load_profile("untimed")
