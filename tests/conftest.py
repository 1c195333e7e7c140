"""What all tests share."""

import torch

# The models here are so small that more threads only wait for each other.
torch.set_num_threads(1)
