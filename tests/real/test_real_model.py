"""The folder that scripts/real_model.py writes is a model that makes sense, and has nothing left of the file that it came from."""

from __future__ import annotations

import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from real_models import smollm2

# A model whose heads stand in the wrong order, or whose tokens are another's, loses much more than this on such plain English.
TEXT = "The sun rises in the east and sets in the west. Water boils at one hundred degrees Celsius, and it freezes at zero degrees."


def test_the_standing_model_answers_and_predicts() -> None:
    folder = smollm2()
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    question = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    asked = tokenizer(question, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
        answer = model.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=12, do_sample=False)
    assert loss < 3.0
    assert "Paris" in tokenizer.decode(answer[0, asked.shape[1] :])
