"""Language models as judges of interpretability: any OpenAI-compatible server, or a local Hugging Face model.

Nothing here is called unless the user asks for it: the default judge is `detection.WordListJudge`.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

import torch

from darkmatter_ext.activations.store import load_model, load_tokenizer
from darkmatter_ext.measurement.detection import Snippet
from darkmatter_ext.runtime.inputs import InputError, StateError
from darkmatter_ext.runtime.storage import parsed_json

TIMEOUT_SECONDS = 120
SNIPPETS_PER_QUESTION = 5  # with more at once, answers lose track of the numbers
ATTEMPTS = 2  # at a question whose answer cannot be parsed

EXPLAIN = (
    "You are shown short texts. In each, the tokens on which one feature of a language model is active are marked "
    "<<like this>>. Say in one short sentence what the feature stands for. Answer with the sentence alone."
)
DETECT = (
    "A feature of a language model stands for:\n{explanation}\n\nFor each numbered text say whether it contains what the "
    "feature stands for. Answer with a JSON list of {count} numbers alone, 1 for yes and 0 for no.\n\n{texts}"
)
JUDGE_ONE = (
    "A feature of a language model stands for: {explanation}\nText: {text}\nDoes the text contain what the feature "
    "stands for? Answer yes or no."
)


def marked(snippet: Snippet) -> str:
    """The text with every token on which the latent has at least half of its largest activation marked."""
    threshold = max(snippet.activations) / 2
    pairs = zip(snippet.tokens, snippet.activations, strict=True)
    return "".join(f"<<{token}>>" if value > 0 and value >= threshold else token for token, value in pairs)


def parse_answers(reply: str, count: int) -> list[bool] | None:
    """The list of `count` zeros and ones in a reply; None if there is no such list."""
    for found in reversed(re.findall(r"\[[\s01,]*\]", reply)):
        answers = re.findall(r"[01]", found)
        if len(answers) == count:
            return [answer == "1" for answer in answers]
    return None


class EndpointJudge:
    """A judge behind an OpenAI-compatible server (`POST URL/chat/completions`).

    The API key, if the environment variable `key_variable` holds one, is sent in the request's header and nowhere else.

    Raises ValueError for an invalid URL; RuntimeError, in one line, if the server cannot be reached or refuses.
    """

    def __init__(self, url: str, model: str, *, key_variable: str = "OPENAI_API_KEY") -> None:
        if not re.match(r"https?://\S+$", url):
            raise InputError(f"endpoint: must be the URL of an OpenAI-compatible server, got {url!r}")
        self.url, self.model, self.key_variable = url.rstrip("/"), model, key_variable

    def check(self) -> None:
        """Ask one small question before any long work starts."""
        self._ask("Answer with the word yes.", most_tokens=4)

    def explain(self, active: Sequence[Snippet]) -> str:
        texts = "\n".join(f"{number}. {marked(snippet)}" for number, snippet in enumerate(active, 1))
        return self._ask(f"{EXPLAIN}\n\n{texts}", most_tokens=80).strip()

    def detect(self, explanation: str, snippets: Sequence[Snippet]) -> list[bool | None]:
        answers: list[bool | None] = []
        for at in range(0, len(snippets), SNIPPETS_PER_QUESTION):
            part = snippets[at : at + SNIPPETS_PER_QUESTION]
            texts = "\n".join(f"{number}. {snippet.text}" for number, snippet in enumerate(part, 1))
            question = DETECT.format(explanation=explanation, count=len(part), texts=texts)
            replies = (parse_answers(self._ask(question, most_tokens=40), len(part)) for _ in range(ATTEMPTS))
            found = next((reply for reply in replies if reply is not None), None)
            answers += [None] * len(part) if found is None else found
        return answers

    def _ask(self, question: str, *, most_tokens: int) -> str:
        content: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": most_tokens,
        }
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self.key_variable)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(content).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
                return parsed_json(response.read())["choices"][0]["message"]["content"] or ""
        except urllib.error.HTTPError as error:
            reason = f"status {error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", "") or error) or type(error).__name__
        except (ValueError, LookupError, TypeError) as error:
            reason = f"not an answer of an OpenAI-compatible server: {type(error).__name__}"
        raise StateError(f"endpoint: must answer chat completions, got {self.url} ({' '.join(reason.split())})")


class LocalJudge:
    """A judge that is a local causal language model (a Hugging Face id, a folder, or the embedded model), decoded greedily.

    Detection compares the logits of "yes" and "no", so every answer can be read. Cost: one forward pass per snippet.
    """

    def __init__(self, model: str, *, device: str = "cpu") -> None:
        self.tokenizer = load_tokenizer(model)
        self.network = load_model(model, device=device, dtype=torch.float32)
        self._yes, self._no = (
            self.tokenizer(word, add_special_tokens=False)["input_ids"][0]
            for word in (self._lead("yes"), self._lead("no"))
        )

    def _lead(self, word: str) -> str:
        return word.capitalize() if self.tokenizer.chat_template else f" {word}"

    def _prompt(self, question: str) -> torch.Tensor:
        if self.tokenizer.chat_template:
            messages = [{"role": "user", "content": question}]
            text = str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        else:
            text = f"{question}\nAnswer:"
        ids: Any = self.tokenizer(text, return_tensors="pt", add_special_tokens=not self.tokenizer.chat_template)
        return ids["input_ids"].to(self.network.device)

    @torch.inference_mode()
    def explain(self, active: Sequence[Snippet]) -> str:
        texts = "\n".join(f"{number}. {marked(snippet)}" for number, snippet in enumerate(active, 1))
        prompt = self._prompt(f"{EXPLAIN}\n\n{texts}")
        network: Any = self.network
        reply = network.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=40,
            do_sample=False,
            pad_token_id=self.tokenizer.eos_token_id or 0,
        )
        return str(self.tokenizer.decode(reply[0, prompt.shape[1] :], skip_special_tokens=True)).strip()

    @torch.inference_mode()
    def detect(self, explanation: str, snippets: Sequence[Snippet]) -> list[bool | None]:
        answers: list[bool | None] = []
        for snippet in snippets:
            prompt = self._prompt(JUDGE_ONE.format(explanation=explanation, text=snippet.text))
            logits = self.network(prompt, use_cache=False).logits[0, -1]
            answers.append(bool(logits[self._yes] > logits[self._no]))
        return answers
