"""For every test: one torch thread. Tiny matrices gain nothing from more, and threads that wait for each other on a
busy machine cost seconds. Tests of thread counts set their own. And no time limit on a Hypothesis example: on a busy
machine it fails good code."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("millrace", deadline=None)
settings.load_profile("millrace")
