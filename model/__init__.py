"""GPT-2: the model, its tokenizer, generation, and import and export of weights."""

from model.config import MODELS, GPTConfig
from model.gpt import GPT

__all__ = ["GPT", "MODELS", "GPTConfig"]
