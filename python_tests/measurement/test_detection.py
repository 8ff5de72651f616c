"""Detection scores on planted latents, and judges: token lists, an OpenAI-compatible server on this machine, a local model."""

import http.server
import json
import math
import threading
from typing import ClassVar

import pytest
import torch
from cases.models import small_model, word_tokenizer

from darkmatter_ext.measurement.detection import (
    DetectionSettings,
    Snippet,
    WordListJudge,
    accuracy_by_decile,
    score_latents,
)
from darkmatter_ext.measurement.judges import EndpointJudge, LocalJudge, marked, parse_answers
from darkmatter_ext.runtime.inputs import InputError

VOCABULARY = [f" w{number}" for number in range(40)]
W, LENGTH = 600, 8
SETTINGS = DetectionSettings(latents=3, snippet_length=LENGTH, explained=12, per_decile=4, inactive=12)


def _text(seed=0):
    ids = torch.randint(40, (W, LENGTH), generator=torch.Generator().manual_seed(seed))
    return ids, [[VOCABULARY[i] for i in row] for row in ids.tolist()]


def _planted(ids):
    """Three latents [w, length, 3]: on one token; on two tokens; anywhere, whatever the text."""
    generator = torch.Generator().manual_seed(1)
    strength = 0.1 + torch.rand(W, LENGTH, 3, generator=generator)
    anywhere = torch.rand(W, LENGTH, generator=generator) < 0.05
    return strength * torch.stack([ids == 5, (ids == 7) | (ids == 30), anywhere], dim=-1)


def _scores(judge, settings=SETTINGS):
    ids, tokens = _text()
    values = _planted(ids)
    documents = [w // 10 for w in range(W)]
    firing = (values > 0).any(1).sum(0)
    return score_latents(tokens, documents, lambda latents: values[:, :, latents], firing, judge, settings)


def test_a_planted_word_is_told_perfectly_and_noise_is_not():
    word, two, noise = _scores(WordListJudge())
    assert json.loads(word.explanation) == ["w5"]
    assert sorted(json.loads(two.explanation)) == ["w30", "w7"]
    for score in (word, two):
        assert score.hits == [1.0] * 10
        assert score.rejections == 1.0
    assert 0.25 < sum(noise.accuracies) / 10 < 0.75
    *deciles, mean = accuracy_by_decile([word, two], seed=0)
    assert [interval.value for interval in deciles] == [1.0] * 10
    assert (mean.low, mean.high) == (1.0, 1.0)


def test_scores_are_seeded_and_latents_without_enough_snippets_left_out():
    assert _scores(WordListJudge()) == _scores(WordListJudge())
    ids, tokens = _text()
    values = _planted(ids)
    values[:, :, 1] = 0
    firing = (values > 0).any(1).sum(0)
    found = score_latents(
        tokens, [w // 10 for w in range(W)], lambda m: values[:, :, m], firing, WordListJudge(), SETTINGS
    )
    assert [score.latent for score in found] == [0, 2]
    with pytest.raises(ValueError, match="no latent is active on enough snippets to be judged"):
        score_latents(tokens, [0] * W, lambda m: values[:, :, m], torch.zeros(3), WordListJudge(), SETTINGS)
    with pytest.raises(InputError, match="tokens: must be of at least 2 documents"):
        score_latents(tokens, [0] * W, lambda m: values[:, :, m], firing, WordListJudge(), SETTINGS)


def test_a_latent_that_marks_documents_is_not_told_by_their_own_words():
    """Every document has a word of its own, and the latent fires on it: known words say nothing of another document."""
    tokens = _text()[1]
    documents = [w // 40 for w in range(W)]
    marked = torch.rand(W, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.1
    tokens = [
        [f" own{documents[w]}" if marked[w, place] else token for place, token in enumerate(row)]
        for w, row in enumerate(tokens)
    ]
    values = marked.float()[:, :, None]
    firing = marked.any(1).sum(0, keepdim=True)
    (score,) = score_latents(tokens, documents, lambda m: values[:, :, m], firing, WordListJudge(), SETTINGS)
    assert score.documents == len(set(documents))
    assert sum(score.hits) == 0


def test_explained_and_judged_texts_share_no_document():
    seen = {"explain": set(), "detect": set()}

    class Watching(WordListJudge):
        def explain(self, active):
            seen["explain"] |= {snippet.tokens for snippet in active}
            return super().explain(active)

        def detect(self, explanation, snippets):
            seen["detect"] |= {snippet.tokens for snippet in snippets}
            return super().detect(explanation, snippets)

    _scores(Watching())
    _, tokens = _text()
    document = {tuple(own): w // 10 for w, own in enumerate(tokens)}
    assert not {document[own] for own in seen["explain"]} & {document[own] for own in seen["detect"]}


def test_marks_and_answers():
    snippet = Snippet((" a", " b", " c"), (0.0, 1.0, 0.4))
    assert marked(snippet) == " a<< b>> c"
    assert parse_answers("Sure: [1, 0, 1]", 3) == [True, False, True]
    assert parse_answers("[1] no, rather [0, 1]", 2) == [False, True]
    assert parse_answers("[1, 0]", 3) is None
    assert parse_answers("yes", 1) is None


class _Server(http.server.BaseHTTPRequestHandler):
    """Answers as a good judge would: explains by the marked word, detects it in the texts."""

    asked: ClassVar[list] = []
    status, broken, evasive = 200, False, False

    def do_POST(self):
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append((self.path, self.headers.get("Authorization"), content))
        question = content["messages"][0]["content"]
        if "<<" in question.split("\n\n", 1)[-1]:
            words = [part.split(">>")[0].strip() for part in question.split("\n\n", 1)[1].split("<<")[1:]]
            reply = max(sorted(set(words)), key=words.count)
        elif "For each numbered text" in question:
            explanation = question.split("\n")[1]
            texts = question.split("\n\n")[-1].split("\n")
            reply = str([int(explanation in text.split()) for text in texts])
            reply = "I cannot say" if self.evasive else reply
        else:
            reply = "yes"
        body = b"<html>" if self.broken else json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    _Server.asked, _Server.status, _Server.broken, _Server.evasive = [], 200, False, False
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.server_address[1]}/v1"
    running.shutdown()
    running.server_close()
    thread.join()


def test_a_server_as_judge(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    judge = EndpointJudge(server + "/", "some-model", key_variable="JUDGE_KEY")
    judge.check()
    word, two, _ = _scores(judge)
    assert word.explanation == "w5"
    assert word.accuracies == [1.0] * 10
    assert (word.accuracy, two.accuracy) == (1.0, pytest.approx(sum(two.accuracies) / 10))
    assert 0.5 < sum(two.accuracies) / 10 < 1  # half of it explained
    path, key, content = _Server.asked[-1]
    assert path == "/v1/chat/completions"
    assert key == "Bearer secret"
    assert (content["model"], content["temperature"]) == ("some-model", 0)
    monkeypatch.delenv("JUDGE_KEY")
    judge.check()
    assert _Server.asked[-1][1] is None


@pytest.mark.runs
def test_unreadable_answers_are_left_out_and_counted(server):
    _Server.evasive = True
    (score, *_) = _scores(EndpointJudge(server, "m"))
    assert score.unanswered == 10 * SETTINGS.per_decile + SETTINGS.inactive
    assert all(math.isnan(accuracy) for accuracy in [*score.accuracies, score.accuracy])


def test_a_server_that_does_not_answer_is_one_line(server):
    with pytest.raises(ValueError, match="endpoint: must be the URL of an OpenAI-compatible server, got 'localhost'"):
        EndpointJudge("localhost", "m")

    def refused(url, message):
        with pytest.raises(RuntimeError, match="endpoint: must answer chat completions, got http") as caught:
            EndpointJudge(url, "m").check()
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    refused("http://127.0.0.1:9/v1", "refused")
    _Server.status = 401
    refused(server, "status 401")
    _Server.status, _Server.broken = 200, True
    refused(server, "not an answer")


def test_a_local_model_as_judge(tmp_path):
    small_model("llama").save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    judge = LocalJudge(str(tmp_path))
    snippets = [Snippet((" the", " model"), (0.0, 1.0)), Snippet((" sparse", " code"), (1.0, 0.0))]
    explanation = judge.explain(snippets)
    assert explanation == judge.explain(snippets)
    assert all(isinstance(answer, bool) for answer in judge.detect(explanation, snippets))
