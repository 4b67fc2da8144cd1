"""Shared by all tests."""

import torch

torch.set_num_threads(1)  # the peers of a test share the machine; one thread also keeps sums in order
