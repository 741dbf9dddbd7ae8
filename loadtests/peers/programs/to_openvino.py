"""A Hugging Face folder into OpenVINO's: python to_openvino.py FOLDER TARGET bf16|int8

Runs in the peers' environment (optimum-intel, nncf, openvino-tokenizers). For `bf16` weights are stored in that dtype;
`int8` is weight compression, symmetric, one scale for each output channel.
"""

import sys

import openvino as ov
from openvino_tokenizers import convert_tokenizer
from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
from transformers import AutoTokenizer


def main() -> None:
    source, target, precision = sys.argv[1:]
    settings = {"load_in_8bit": False}
    if precision == "int8":
        settings = {"quantization_config": OVWeightQuantizationConfig(bits=8, sym=True)}
    network = OVModelForCausalLM.from_pretrained(source, export=True, compile=False, **settings)
    network.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(target)
    parts = convert_tokenizer(tokenizer, with_detokenizer=True)
    for name, part in zip(("tokenizer", "detokenizer"), parts, strict=True):
        ov.save_model(part, f"{target}/openvino_{name}.xml")


main()
