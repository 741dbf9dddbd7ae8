"""For every test: one torch thread. Tiny matrices gain nothing from more, and threads that wait for each other on a
busy machine cost seconds. Tests of thread counts set their own."""

import torch

torch.set_num_threads(1)
