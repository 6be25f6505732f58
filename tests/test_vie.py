"""The judge that is asked: its questions, how answers become scores, a server, and an MLLM of this project."""

import base64
import contextlib
import dataclasses
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from metacanvas_jax import files, retries
from metacanvas_jax.data.decoding import encode_png
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.errors import Unreachable, UserError
from metacanvas_jax.evaluate.judging import questions, vie
from metacanvas_jax.evaluate.judging.server import ServerJudge
from metacanvas_jax.evaluate.tree import Entry
from metacanvas_jax.tasks import Bucket

EDIT = Bucket("image_editing", (24, 24))


def picture(seed=0, frames=1):
    return np.random.default_rng(seed).integers(0, 256, (frames, 24, 24, 3), dtype=np.uint8)


def edit(number, bucket=EDIT):
    shape = (bucket.frames, 24, 24, 3)
    sample = Sample(f"edit {number}", np.zeros(shape, np.uint8), task=bucket.task, source=picture(number))
    return Entry(f"entry {number}", bucket, lambda: sample, lambda results: {}, (f"SRC/{number}.png", f"{number}.png"))


@pytest.fixture
def tree(tmp_path):
    """Three entries, of which two are drawn."""
    for number in (0, 1):
        files.write(tmp_path / "tree" / f"{number}.png", encode_png(picture(10 + number)[0]))
    return [edit(number) for number in range(3)], tmp_path / "tree", tmp_path / "scores" / "vie.json"


def said(*scores):
    return json.dumps({"reason": "because", "scores": list(scores)})


class Said:
    """Gives the answers that it was told to give, and remembers the questions."""

    def __init__(self, *answers, name="said"):
        self.name, self.left, self.asked = name, list(answers), []

    def answers(self, asked):
        self.asked += asked
        return [self.left.pop(0) for _ in asked]


@pytest.mark.parametrize(
    ("answer", "scores"),
    [
        (said(7, 8.5), (7.0, 8.5)),
        (f"Let me see {{that}}.\n```json\n{said(0, 10)}\n```", (0.0, 10.0)),
        ('{"note": {"scores": [1, 2]}}', (1.0, 2.0)),
        (said(11, 3), None),
        (said(-1, 3), None),
        (said(3), None),
        (said("3", 4), None),
        (said(True, 4), None),
        ('{"scores": [NaN, 4]}', None),
        ('{"scores": [7, 8', None),
        ("7 and 8", None),
        ("", None),
    ],
)
def test_an_answer_has_two_numbers_or_no_score(answer, scores):
    assert questions.read(answer) == scores


def test_the_score_is_the_root_of_the_lower_numbers_and_the_mean_over_results(tree):
    entries, out, path = tree
    judge = Said(said(9, 4), said(9, 10), said(8, 8), said(2, 7))
    found = vie.judge_tree(judge, entries, out, path)
    means = found.means()["image_editing"]
    assert means == {"SC": 6.0, "PQ": 5.5, "O": pytest.approx((6 + 4) / 2)}
    assert found.missing == 1 and found.unread == 0 and "1 that are missing" in found.table()
    kept = json.loads(path.read_text())
    assert kept["version"] == questions.VERSION and kept["judge"] == "said"
    assert kept["results"][0]["answers"]["consistency"] == said(9, 4) and kept["results"][1]["scores"]["PQ"] == 2.0
    both = [question for question in judge.asked if question.aspect == "consistency"]
    np.testing.assert_array_equal(both[1].parts[1], entries[1].sample().source)
    np.testing.assert_array_equal(both[1].parts[3], picture(11))
    assert "edit 1" in both[1].parts[4]
    qualities = [question for question in judge.asked if question.aspect == "quality"]
    assert not any("edit" in part for question in qualities for part in question.parts if isinstance(part, str))


def test_an_unreadable_answer_is_counted_and_kept_and_scores_nothing(tree):
    entries, out, path = tree
    found = vie.judge_tree(Said(said(9, 4), "It is fine, 9/10.", said(8, 8), said(8, 8)), entries, out, path)
    assert found.unread == 1 and found.means()["image_editing"]["O"] == 8.0
    assert "1 whose answers could not be read" in found.table()
    kept = json.loads(path.read_text())
    assert kept["counts"] == {"judged": 2, "unread": 1, "missing": 1}
    assert kept["results"][0]["answers"]["quality"] == "It is fine, 9/10." and kept["results"][0]["scores"] is None


def test_what_was_judged_is_not_asked_again_unless_it_changed(tree):
    entries, out, path = tree
    first = vie.judge_tree(Said(*[said(8, 8)] * 4), entries, out, path)
    assert vie.judge_tree(Said(), entries, out, path) == first
    files.write(out / "1.png", encode_png(picture(20)[0]))
    again = vie.judge_tree(Said(said(2, 2), said(2, 2)), entries, out, path)
    assert [one.scores()["O"] for one in again.judged] == [8.0, 2.0]
    with pytest.raises(UserError, match=r"holds the answers of said, .*: move it away"):
        vie.judge_tree(Said(name="another"), entries, out, path)


def test_videos_and_references_have_questions_of_their_own():
    video = picture(frames=5)
    edited = Sample("make it blue", video, task="video_editing", source=picture(1, frames=5))
    consistency, quality = questions.questions(edited, video, 4.0)
    assert consistency.parts[1].shape == consistency.parts[3].shape == (5, 24, 24, 3) and consistency.fps == 4.0
    assert "edited video" in consistency.parts[2] and "motions" in quality.parts[2]
    shown = Sample("both run", video, task="reference_to_video", references=(picture(1)[0], picture(2)[0]))
    parts = questions.questions(shown, video, 4.0)[0].parts
    assert [part.shape[0] for part in parts if not isinstance(part, str)] == [1, 1, 5]
    with pytest.raises(UserError, match="text_to_image gives the result nothing"):
        questions.questions(Sample("a cat", picture(), task="text_to_image"), picture(), 1.0)
    with pytest.raises(UserError, match="text_to_image gives nothing to compare"):
        vie.check([dataclasses.replace(edit(0), bucket=Bucket("text_to_image", (24, 24)))])


@contextlib.contextmanager
def serving(models, reply):
    """A server on this machine that answers chats by ``reply(body)``: a text, or (code, anything)."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.say(200, {"data": [{"id": name} for name in models]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = reply(body) if self.path == "/v1/chat/completions" else (404, {})
            found = (200, {"choices": [{"message": {"content": answer}}]}) if isinstance(answer, str) else answer
            self.say(*found)

        def say(self, code, value):
            data = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_server_sees_texts_and_pictures_in_their_order(tree):
    entries, out, path = tree
    bodies = []

    def reply(body):
        bodies.append(body)
        shown = body["messages"][0]["content"]
        return said(6, 9) if sum(part["type"] == "image_url" for part in shown) == 2 else said(4, 4)

    with serving(["qwen"], reply) as url:
        found = vie.judge_tree(ServerJudge(url), entries, out, path)
    assert found.judge == f"qwen at {url}/v1" and found.means()["image_editing"] == {"SC": 6.0, "PQ": 4.0, "O": 24**0.5}
    assert all(body["temperature"] == 0 and body["model"] == "qwen" for body in bodies)
    content = next(
        body["messages"][0]["content"] for body in bodies if "edit 1" in body["messages"][0]["content"][-1]["text"]
    )
    assert [part["type"] for part in content] == ["text", "image_url", "text", "image_url", "text"]
    sent = content[1]["image_url"]["url"].removeprefix("data:image/png;base64,")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(sent)))), picture(1)[0])


def test_a_server_that_does_not_answer_is_one_line(tree, monkeypatch):
    entries, out, path = tree
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.001)
    with serving(["a", "b"], lambda body: (500, {"error": "out of memory"})) as url:
        with pytest.raises(UserError, match="has the models a, b: name one with --judge-model"):
            ServerJudge(url)
        with pytest.raises(Unreachable, match=r"no answer in 6 tries \(the server answers 500, .*out of memory"):
            vie.judge_tree(ServerJudge(url, "a"), entries, out, path)
    refused = pytest.raises(UserError, match=r"the server answers 400, .*no such")
    with serving(["a"], lambda body: (400, {"error": "no such picture"})) as url, refused:
        vie.judge_tree(ServerJudge(url), entries, out, path)
    with serving(["a"], lambda body: (200, {"choices": []})) as url, pytest.raises(UserError, match="no answer in"):
        ServerJudge(url).answers([questions.Question("quality", ("?",))])
    with pytest.raises(UserError, match="/v1/models: no answer of a server"):
        ServerJudge(url)


@pytest.mark.torch
def test_the_mllm_of_a_folder_answers_as_transformers_does(tmp_path):
    support = pytest.importorskip("qwen_torch_support")
    from qwen_support import tokenizer

    from metacanvas_jax.evaluate.judging import local

    reference = support.reference_model()
    reference.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    judge = local.LocalJudge(str(tmp_path), each=2, most=6, tokens=4)
    video = picture(frames=5)
    asked = [
        questions.Question("quality", ("What is this", picture(1), "?")),
        questions.Question("consistency", ("A cat", picture(2), " and", picture(3), "?")),
        questions.Question("quality", ("A house", picture(4), ", red")),
        questions.Question("quality", ("A video", video, "?"), fps=4.0),
    ]
    answers = judge.answers(asked)
    assert judge.prompt(asked[3]).media[0][0].grid[0] == 2, "four of its five frames, two by two"
    for question, answer in list(zip(asked, answers, strict=True))[:3]:  # positions after a video differ by release
        expected = support.greedy(reference, judge.prompt(question), 6)
        assert answer == judge.prompter.decode(np.asarray(expected, np.int32))
    assert len(set(answers)) > 1
    with pytest.raises(UserError, match=r"no such file|config\.json"):
        local.LocalJudge(str(tmp_path / "gone"))
