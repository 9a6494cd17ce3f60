"""Chats are rendered once: a template may print the date (strftime_now) or anything else that is different tomorrow.

A prompt's text must not change within a run, on resuming, or when its model is asked. So each chat that a template has
rendered is kept, saved beside the tokenizer as chat_texts.json, and used again as long as template and messages are
the same. Questions are not among them: prompts are rendered with marks in their place (task/prompts.py).
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from grpo_ds.errors import UsageError

CHAT_TEXTS_FILE = "chat_texts.json"
ChatTexts = dict[str, str]  # digest of template, messages and options -> rendered text


def keep_chat_texts(tokenizer: Tokenizer, folder: Path) -> None:
    """Make the tokenizer render each chat once, beginning with the texts saved in the folder, if there are any."""
    texts, render = _read(folder / CHAT_TEXTS_FILE), tokenizer.apply_chat_template

    def apply_chat_template(conversation: Any, tokenize: bool = True, **options: Any) -> Any:
        if tokenize:
            return render(conversation, tokenize=True, **options)
        asked = json.dumps([tokenizer.chat_template, conversation, options], sort_keys=True, default=str)
        key = hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()
        if key not in texts:
            texts[key] = str(render(conversation, tokenize=False, **options))
        return texts[key]

    vars(tokenizer).update(apply_chat_template=apply_chat_template, chat_texts=texts)


def chat_texts(tokenizer: Tokenizer) -> ChatTexts:
    """Return the texts that the tokenizer keeps; changing them changes its later answers."""
    texts: ChatTexts = vars(tokenizer).get("chat_texts", {})
    return texts


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write an ordinary tokenizer, and the texts of its chats beside it."""
    tokenizer.save_pretrained(folder)
    text = json.dumps(chat_texts(tokenizer), indent=1, sort_keys=True, ensure_ascii=False)
    (folder / CHAT_TEXTS_FILE).write_text(f"{text}\n", encoding="utf-8", errors="surrogatepass")


def _read(file: Path) -> ChatTexts:
    if not file.is_file():
        return {}
    try:
        texts = json.loads(file.read_text(encoding="utf-8", errors="surrogatepass"))
    except (OSError, ValueError, RecursionError):
        texts = None
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise UsageError(
            f"{file} is damaged; it holds the text of prompts as the model was trained on them.\n"
            "Restore it from a checkpoint of that run, or delete it: the chat template then renders them again."
        )
    return texts
