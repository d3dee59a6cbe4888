"""Sampling with plain transformers and peft, without the engine, as any user of an adapter would do it."""

import random
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from demo import world


def complete(base: Path, adapter: Path | None, count: int) -> list[str]:
    """`count` completions, sampled at temperature 1. Every model gets the same prompts.

    The base is quantised as in training, because an adapter belongs to the base it was trained on.
    """
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    generator = random.Random(5)
    prompts = [world.prompt(generator) for _ in range(count)]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    torch.manual_seed(5)
    with torch.no_grad():
        tokens = model.generate(**inputs, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=48)
    texts: list[str] = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts
