"""What the page shows of generated text, as HTML: samples, and each token's probability."""

import html
from collections.abc import Iterable

import torch

from model import GPT, tokenizer
from model.decoder import resolve_window


def status_html(text: str, state: str = "") -> str:
    """The line below the texts; `state` is "done" for the last one."""
    return f'<div class="status {state}">{text}</div>'


def texts_html(prompt: str, texts: Iterable[str]) -> str:
    """The samples, given as HTML, the prompt before each."""
    head = f'<div class="sample"><span class="prompt">{html.escape(prompt)}</span>'
    body = "".join(f'{head}<span class="text">{text}</span></div>' for text in texts)
    return f'<div class="texts">{body}</div>'


def token_chances(model: GPT, prompt: str, text: str) -> list[tuple[bytes, float]]:
    """Each token of `text` with its probability after the tokens before it.

    A text longer than the window is read in halves of it, so each token sees half a window or more.
    """
    window, ids = resolve_window(model, None), tokenizer.encode(text).tolist()
    tokens = tokenizer.encode_prompt(prompt) + ids
    at, found = len(tokens) - len(ids), []
    with torch.inference_mode():
        while at < len(tokens):
            end = min(len(tokens), max(window, at + window // 2))
            row = torch.tensor(tokens[max(0, end - window) : end])
            logits = model(row[None, :-1].to(model.transformer.wte.weight.device))[0, at - end :]
            chances = logits.float().softmax(-1).cpu()
            found += chances[torch.arange(end - at), row[at - end :]].tolist()
            at = end
    return [*zip(tokenizer.get_encoding().decode_tokens_bytes(ids), found, strict=True)]


def shaded(tokens: Iterable[tuple[bytes, float]]) -> str:
    """HTML of tokens, darker if likelier; tokens that share a character are shown as one."""
    out, held, chance = [], b"", 1.0
    for data, p in tokens:
        held, chance = held + data, chance * p
        try:
            word = html.escape(held.decode())
        except UnicodeDecodeError:
            continue
        out.append(
            f'<span class="chance" style="--p:{chance:.3f}" title="{chance:.1%}">{word}</span>'
        )
        held, chance = b"", 1.0
    return "".join(out) + html.escape(held.decode("utf-8", "replace"))
