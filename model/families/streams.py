"""Networks of layers that need not be attention to everything (`model/kinds.py`): the one family of our own.

Everything but the layers' kinds is Llama's.
"""

from dataclasses import replace

from model.families.llama import LLAMA

STREAMS = replace(
    LLAMA,
    name="millrace-streams",
    architecture="MillraceStreams",
    names={
        **LLAMA.names,
        "layers.*.attn.relative": ("model.layers.*.self_attn.relative",),
        "layers.*.attn.shift": ("model.layers.*.self_attn.shift",),
        "layers.*.attn.input": ("model.layers.*.lstm.input",),
        "layers.*.attn.recurrent": ("model.layers.*.lstm.recurrent",),
    },
    mixed=True,
)
