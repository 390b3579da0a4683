"""label_preferences.py: what is written when, what each tab gets, who is refused, what is drawn; and a person's round in a
headless browser, after which sobirl_rlhf.py learns from the labels."""

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import label_preferences as page
import numpy as np
import pytest
import sobirl_rlhf as rlhf
import torch
from conftest import REPO, environment, read_csv
from label_session import browser_missing, open_browser, press, serve, shown, wait
from PIL import Image, ImageSequence

HOPPER = SimpleNamespace(env_id="Hopper-v4", env_kwargs="{}")
LENGTH = 4
TINY = {
    "env_id": "Hopper-v4", "num_steps": 64, "total_timesteps": 3 * 64, "learning_starts": 64, "batch_size": 8, "actor_width": 8,
    "critic_width": 8, "reward_width": 6, "fragment_length": LENGTH, "queue_size": 40, "warmup_pairs": 4, "warmup_epochs": 2,
    "pairs_per_iteration": 2, "reward_batch_size": 8, "heldout_pairs": 8, "checkpoint_every": 1, "device": "cpu", "seed": 6,
}  # fmt: skip


def train(**changes):
    """A tiny run of sobirl_rlhf.py in this process; returns its folder."""
    return rlhf.train(rlhf.Args(**TINY | changes))


def write_pairs(folder, count: int):
    """A run folder with `count` pairs of Hopper that moves as no Hopper does; returns it."""
    generator = torch.Generator().manual_seed(count)
    inputs = torch.randn(count, 2, LENGTH, 14, generator=generator) * torch.tensor([1.0] + [0.05] * 13)
    states = torch.randn(count, 2, LENGTH, 6, generator=generator) * 0.1 + torch.tensor([0, 1.25, 0, 0, 0, 0])
    folder.mkdir(parents=True, exist_ok=True)
    page.ask_people(folder / "preferences", HOPPER, inputs=inputs, states=states)
    return folder


@pytest.fixture
def folder(tmp_path):
    """The folder of twelve pairs."""
    return write_pairs(tmp_path / "run", 12) / "preferences"


def labels_of(folder, repeat_every: int = 0) -> page.Labels:
    return page.Labels(folder, "ana", repeat_every)


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "labels.jsonl").read_text().splitlines()]


# ---- Labels on disk --------------------------------------------------------------------------------------------
def test_an_answer_is_on_disk_when_it_is_accepted_and_names_the_preferred_fragment(folder):
    labels = labels_of(folder)
    for answer in ("left", "right", "equal", "skip") * 3:
        question = labels.next("1")
        assert labels.answer("1", **{name: question[name] for name in ("pair", "repeat")}, answer=answer, seconds=1.5)
        row = lines(folder)[-1]
        assert row | {"time": 0, "label": 0} == {
            "pair": question["pair"], "answer": answer, "label": 0, "left": question["left"], "seconds": 1.5, "repeat": False,
            "tab": "1", "labeller": "ana", "time": 0,
        }  # fmt: skip
        preferred = {"left": question["left"], "right": 1 - question["left"]}.get(answer)  # a fragment
        assert row["label"] == ({0: 1.0, 1: 0.0}[preferred] if preferred is not None else {"equal": 0.5, "skip": None}[answer])
    assert labels.next("1") is None and labels.progress() == {"answered": 12, "agree": [0, 0]}
    assert {row["left"] for row in lines(folder)} == {0, 1}


def test_what_a_run_reads_is_the_last_answer_that_was_not_undone(folder):
    labels = labels_of(folder)
    for answer in ("left", "right", "left", "skip"):
        labels.answer("1", labels.next("1")["pair"], False, answer, 0.0)
    pairs = [row["pair"] for row in lines(folder)]
    assert labels.undo("1") and labels.undo("1")
    again = labels.next("1")["pair"]
    assert again == pairs[2]  # the one that was undone last is shown again
    labels.answer("1", again, False, "equal", 0.0)
    text = (folder / "labels.jsonl").read_text()
    (folder / "labels.jsonl").write_text(text + '{"pair": 3, "answer": "le')  # as in the middle of a write
    rows = [json.loads(line) for line in text.splitlines()]
    expected = {row["pair"]: row["label"] for row in rows[:2]} | {again: 0.5}
    for module in (page, rlhf):
        assert module.read_labels(folder / "labels.jsonl") == expected


def test_undo_goes_back_through_a_tabs_own_answers_only(folder):
    labels = labels_of(folder)
    for tab in ("1", "2", "1"):
        labels.answer(tab, labels.next(tab)["pair"], False, "left", 0.0)
    assert [labels.undo("1") for _ in range(3)] == [True, True, False]
    assert [row["tab"] for row in labels.answers.values()] == ["2"]
    assert labels.progress()["answered"] == 1


def test_a_server_that_starts_again_knows_everything_but_a_line_that_was_cut_off(folder):
    labels = labels_of(folder, repeat_every=2)
    for _ in range(7):
        question = labels.next("1")
        labels.answer("1", question["pair"], question["repeat"], "left", 0.0)
    labels.undo("1")
    whole = (folder / "labels.jsonl").read_bytes()
    (folder / "labels.jsonl").write_bytes(whole + b'{"pair": 3, "ans')
    again = labels_of(folder, repeat_every=2)
    assert (folder / "labels.jsonl").read_bytes() == whole
    assert list(again.answers.items()) == list(labels.answers.items()) and again.progress() == labels.progress()
    pair = again.next("2")["pair"]
    again.answer("2", pair, False, "right", 0.0)
    assert lines(folder)[:-1] == [json.loads(line) for line in whole.splitlines()] and lines(folder)[-1]["pair"] == pair


def test_a_full_disk_loses_no_line_and_leaves_no_half_one(folder):
    labels = labels_of(folder)
    question = labels.next("1")
    labels.answer("1", question["pair"], False, "left", 0.0)
    whole, file = (folder / "labels.jsonl").read_bytes(), labels.file

    def write_half(line):
        return file.write(line[: len(line) // 2])

    labels.file = SimpleNamespace(write=write_half, fileno=file.fileno, truncate=file.truncate)
    question = labels.next("1")
    with pytest.raises(OSError, match="full"):
        labels.answer("1", question["pair"], False, "left", 0.0)
    assert (folder / "labels.jsonl").read_bytes() == whole and labels.next("1") == question
    labels.file = file
    assert labels.answer("1", question["pair"], False, "left", 0.0) and len(lines(folder)) == 2


def test_two_tabs_get_different_pairs_and_no_pair_is_answered_twice(folder):
    labels = labels_of(folder)
    first, second = labels.next("1"), labels.next("2")
    assert first["pair"] != second["pair"] and labels.next("1") == first
    assert not labels.answer("2", first["pair"], False, "left", 0.0)  # tab 1 looks at it
    assert labels.answer("1", first["pair"], False, "left", 0.0)
    assert not labels.answer("1", first["pair"], False, "right", 0.0)  # as by a second press of the key
    assert not labels.answer("2", first["pair"], False, "right", 0.0)
    assert len(lines(folder)) == 1


def test_a_tab_that_was_closed_gives_its_pair_back(folder, monkeypatch):
    labels = labels_of(folder)
    now = time.monotonic()
    monkeypatch.setattr(page.time, "monotonic", lambda: now)
    pair = labels.next("1")["pair"]
    now += 0.9 * labels.LEASE
    assert labels.next("1")["pair"] == pair  # it lives, and holds the pair longer
    now += 0.9 * labels.LEASE
    assert labels.next("2")["pair"] != pair
    now += 0.2 * labels.LEASE
    assert labels.next("3")["pair"] == pair
    assert not labels.answer("1", pair, False, "left", 0.0)


def test_threads_of_several_tabs_answer_each_pair_once(tmp_path):
    folder = write_pairs(tmp_path / "run", 60) / "preferences"
    labels, accepted = labels_of(folder), []

    def work(tab):
        while question := labels.next(tab):
            accepted.append(labels.answer(tab, question["pair"], False, "left", 0.0))

    threads = [threading.Thread(target=work, args=(str(tab),)) for tab in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(accepted) == 60 and sorted(row["pair"] for row in lines(folder)) == list(range(60))


def test_repeats_come_with_exchanged_sides_count_for_agreement_and_teach_nothing(folder):
    labels = labels_of(folder, repeat_every=3)
    asked = []
    while question := labels.next("1"):
        asked.append(question)
        # Always the same fragment, but the second repeat the other way.
        repeats = sum(each["repeat"] for each in asked)
        left = (question["left"] == 0) ^ (question["repeat"] and repeats == 2)
        labels.answer("1", question["pair"], question["repeat"], "left" if left else "right", 0.0)
    assert [each["repeat"] for each in asked].count(True) == 4
    for each in asked:
        if each["repeat"]:
            (once,) = [other for other in asked if other["pair"] == each["pair"] and not other["repeat"]]
            assert once["left"] != each["left"]
            assert asked.index(each) - asked.index(once) >= 3
    assert labels.agreement() == (3, 4) and labels.progress()["answered"] == 12
    assert page.read_labels(folder / "labels.jsonl") == dict.fromkeys(range(12), 1.0)


def test_new_pairs_of_a_running_run_are_found_and_come_first(folder):
    labels = labels_of(folder)
    labels.answer("1", labels.next("1")["pair"], False, "left", 0.0)
    page.ask_people(folder, HOPPER, inputs=torch.zeros(2, 2, LENGTH, 14), states=torch.zeros(2, 2, LENGTH, 6))
    assert page.pairs_asked(folder) == [*range(14)] and labels.next("1")["pair"] == 13


def test_the_number_of_a_deleted_pair_that_was_answered_is_not_used_again(folder):
    """Neither where there are fewer files than the last number says, nor where only its answer is left."""
    labels = labels_of(folder)
    for _ in range(3):
        labels.answer("1", labels.next("1")["pair"], False, "left", 0.0)  # 11, 10, 9
    for number in (4, 11):
        (folder / f"{number:07}.pt").unlink()
    page.ask_people(folder, HOPPER, inputs=torch.zeros(1, 2, LENGTH, 14), states=torch.zeros(1, 2, LENGTH, 6))
    assert page.pairs_asked(folder) == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 12] and labels.next("1")["pair"] == 12
    assert [pair["pair"] for pair in rlhf.labelled_pairs(folder / "labels.jsonl", set())[0]] == [10, 9]


@pytest.mark.parametrize("repeat", [False, True])
def test_a_question_whose_pair_is_deleted_is_given_up(folder, repeat):
    """Also while a tab looks at it, and where it would be shown a second time."""
    labels = labels_of(folder, repeat_every=3)
    for _ in range(3 * repeat):
        labels.answer("1", labels.next("1")["pair"], False, "left", 0.0)
    question = labels.next("1")
    assert question["repeat"] is repeat
    (folder / f"{question['pair']:07}.pt").unlink()
    for tab in ("1", "2"):
        assert labels.next(tab)["pair"] in page.pairs_asked(folder)
    if repeat:
        again = labels_of(folder, repeat_every=3)  # as after a start of the server, which knows of no lease
        assert again.next("3")["pair"] in page.pairs_asked(folder)


def test_a_new_pair_with_the_number_of_a_deleted_one_has_its_own_clip(folder, monkeypatch):
    """The number of the newest pair is free again if nobody has answered it."""
    monkeypatch.setattr(page.Drawer, "start", lambda drawer: None)
    monkeypatch.setattr(page.Drawer, "draw", lambda drawer, path, left: path.read_bytes())
    drawer = page.Drawer(folder, 1.0, 48)
    before = drawer.clip(11, 0)
    assert drawer.clip(11, 0) is before  # not drawn again
    (folder / "0000011.pt").unlink()
    page.ask_people(folder, HOPPER, inputs=torch.zeros(1, 2, LENGTH, 14), states=torch.zeros(1, 2, LENGTH, 6))
    assert drawer.clip(11, 0) == (folder / "0000011.pt").read_bytes() != before


@pytest.mark.parametrize("line", ["3", '{"pair": 1}', "\0", '{"pair": [], "answer": "left", "label": 1, "repeat": false}'])
def test_a_damaged_line_is_bad_input_for_a_run_and_half_a_last_one_is_skipped(folder, line):
    good = '{"pair": 3, "answer": "left", "label": 1, "repeat": false}\n'
    (folder / "labels.jsonl").write_text(f"{good}{line}\n{good}")
    with pytest.raises(rlhf.BadInput, match="labels.jsonl is damaged: .* is no answer"):
        rlhf.read_labels(folder / "labels.jsonl")
    (folder / "labels.jsonl").write_text(good + line)
    assert rlhf.read_labels(folder / "labels.jsonl") == {3: 1}


def test_a_run_that_waits_ends_with_one_sentence_when_the_labels_are_damaged(tmp_path, monkeypatch):
    def damage(seconds):  # while it waits
        (folder,) = tmp_path.glob("*/preferences")
        (folder / "labels.jsonl").write_text("no answer\n")

    monkeypatch.setattr(rlhf.time, "sleep", damage)
    with pytest.raises(rlhf.BadInput, match="'no answer' is no answer; mend or remove it"):
        train(run_dir=tmp_path, teacher="human", label_budget=4)


def test_a_run_that_waits_goes_on_when_the_pairs_that_it_waits_for_are_deleted(tmp_path, monkeypatch):
    def delete_one(seconds):
        pairs = sorted(tmp_path.glob("*/preferences/*.pt"))
        assert pairs, "it waits for pairs that are gone"
        pairs[0].unlink()

    monkeypatch.setattr(rlhf.time, "sleep", delete_one)
    folder = train(run_dir=tmp_path, teacher="human", label_budget=4)
    assert json.loads((folder / "result.json").read_text())["status"] == "finished"


def test_a_pair_comes_back_as_it_was_written(folder):
    labels = labels_of(folder)
    for answer in ("left", "skip", "right"):
        labels.answer("1", labels.next("1")["pair"], False, answer, 0.0)
    taken = {lines(folder)[0]["pair"]}
    pairs, answers = rlhf.labelled_pairs(folder / "labels.jsonl", taken)
    assert [each["pair"] for each in pairs] == [lines(folder)[2]["pair"]] and answers.tolist() == [lines(folder)[2]["label"]]
    assert taken == {lines(folder)[k]["pair"] for k in (0, 2)}
    assert pairs[0]["inputs"].shape == (2, LENGTH, 14) and pairs[0]["env_id"] == "Hopper-v4"
    assert rlhf.labelled_pairs(folder / "labels.jsonl", taken)[0] == []
    sizes = [path.stat().st_size for path in folder.glob("*.pt")]
    assert len(sizes) == 12 and max(sizes) < 5000  # not all pairs in each file


# ---- Who is refused --------------------------------------------------------------------------------------------
class NoDrawer:
    """Clips that cost nothing."""

    def clip(self, pair: int, left: int) -> bytes:
        return f"{pair} {left}".encode()


TOKEN = "a-token-of-the-test"


@pytest.fixture
def client(folder):
    """Flask's own client of the page."""
    args = page.Args(source=folder.parent)
    return page.make_app(labels_of(folder), NoDrawer(), TOKEN, None, args).test_client()


def test_the_page_and_its_requests(client, folder):
    assert client.get(f"/{TOKEN}/").status_code == 200
    state = client.post(f"/{TOKEN}/next", json={"tab": "1"}).json
    assert state["answered"] == 0 and state["budget"] == 12 and state["question"] == "Which clip is better?"
    pair, left = state["next"]["pair"], state["next"]["left"]
    reply = client.get(f"/{TOKEN}/clip/{pair}/{left}")
    assert reply.data == f"{pair} {left}".encode() and reply.mimetype == "image/webp"
    sent = {"tab": "1", "pair": pair, "repeat": False, "answer": "left", "seconds": 2.5}
    state = client.post(f"/{TOKEN}/answer", json=sent).json
    assert state["answered"] == 1 and state["next"]["pair"] != pair
    assert client.post(f"/{TOKEN}/answer", json=sent).status_code == 409
    assert client.post(f"/{TOKEN}/undo", json={"tab": "2"}).status_code == 409
    assert client.post(f"/{TOKEN}/undo", json={"tab": "1"}).json["next"]["pair"] == pair
    assert [row["answer"] for row in lines(folder)] == ["left", "undo"]


def test_no_answer_of_the_server_tells_a_reward(client):
    """It tells the pair's number, which fragment is on the left, and the counters."""
    state = client.post(f"/{TOKEN}/next", json={"tab": "1"}).json
    assert set(state) == {"answered", "agree", "next", "budget", "question"} and set(state["next"]) == {"pair", "repeat", "left"}


@pytest.mark.parametrize("token", ["", "wrong", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "%C3%A9"])
def test_a_wrong_token_is_refused(client, folder, token):
    for path in ("", "clip/0/0"):
        assert client.get(f"/{token}/{path}").status_code == 403
    sent = {"tab": "1", "pair": 3, "repeat": False, "answer": "left", "seconds": 1.0}
    for path in ("next", "answer", "undo"):
        assert client.post(f"/{token}/{path}", json=sent).status_code == 403
    assert client.get("/").status_code == 403 and lines(folder) == []


@pytest.mark.parametrize(
    "path", ["clip/../labels.jsonl", "clip/..%2flabels.jsonl/0", "clip/%2e%2e/0", "../../etc/passwd", "clip/0000000.pt/0", "clip/-1/0",
             "clip/0/2", "clip//etc/passwd", "static/labels.jsonl", "labels.jsonl", "clip/1e0/0", "clip/\u0661\x00/0", "clip/12/0",
             "clip/99999999999999999999/0"],
)  # fmt: skip
def test_no_path_of_a_request_reaches_a_file(client, path):
    reply = client.get(f"/{TOKEN}/{path}")
    assert reply.status_code in (403, 404) and b"pair" not in reply.data


@pytest.mark.parametrize(
    "sent", [
        {}, [], {"tab": "1", "pair": 12, "answer": "left"}, {"tab": "1", "pair": -1, "answer": "left"}, {"tab": "1", "answer": "both"},
        {"tab": "1", "pair": 1.5, "answer": "left"}, {"tab": "1", "pair": True, "answer": "left"}, {"tab": "", "answer": "left"},
        {"tab": "x" * 65, "answer": "left"}, {"tab": "1", "answer": "left", "seconds": -1.0}, {"tab": "1", "answer": "left", "reward": 1},
        {"tab": "../x", "answer": "left"}, {"tab": "1", "pair": "1", "answer": "left"},
    ],
)  # fmt: skip
def test_a_bad_answer_is_refused_and_nothing_is_written(client, folder, sent):
    assert client.post(f"/{TOKEN}/answer", json=sent).status_code == 400
    assert lines(folder) == []


def test_what_no_page_of_ours_sends_is_refused(client, folder):
    good = {"tab": "1", "pair": 3, "repeat": False, "answer": "left", "seconds": 1.0}
    form = client.post(f"/{TOKEN}/answer", data=good)  # what a form of another site can send
    text = client.post(f"/{TOKEN}/answer", data=json.dumps(good), content_type="text/plain")
    other = client.post(f"/{TOKEN}/answer", json=good, headers={"Sec-Fetch-Site": "cross-site"})
    large = client.post(f"/{TOKEN}/answer", json=good | {"answer": "x" * 5000})
    bent = client.post(f"/{TOKEN}/answer", json=good, headers={"Host": "evil.example"})
    assert [each.status_code for each in (form, text, other, large, bent)] == [415, 415, 403, 413, 403]
    assert lines(folder) == []
    assert client.post(f"/{TOKEN}/answer", json=good, headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200


def test_headers_that_keep_the_page_to_itself(client):
    first, second = client.get(f"/{TOKEN}/"), client.get(f"/{TOKEN}/")
    policy = first.headers["Content-Security-Policy"]
    (nonce,) = set(re.findall("nonce-([^']+)", policy))
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert first.text.count(f'nonce="{nonce}"') == 2 and nonce not in second.text
    assert first.headers["Referrer-Policy"] == "no-referrer" and first.headers["Cache-Control"] == "no-store"
    assert "Set-Cookie" not in first.headers and "http" not in first.text.replace("<!doctype html>", "")


# ---- Clips -----------------------------------------------------------------------------------------------------
def frames_of(clip: bytes) -> list[np.ndarray]:
    """The images of an animated WebP, and how long each is shown in ms."""
    with Image.open(io.BytesIO(clip)) as file:
        return [np.asarray(frame.convert("RGB")).astype(int) for frame in ImageSequence.Iterator(file)]


def test_an_animation_shows_both_sequences_in_step_on_their_sides():
    """Grey levels 40 k on the left and 255 - 40 k on the right in frame k."""
    left = [np.full((84, 84), 40 * k, dtype=np.uint8) for k in range(5)]
    right = [np.full((84, 84, 3), 255 - 40 * k, dtype=np.uint8) for k in range(5)]
    clip = page.animation(left, right, 2.0, 64)
    frames = frames_of(clip)
    assert len(frames) == 5 and all(frame.shape == (64, 132, 3) for frame in frames)
    for k, frame in enumerate(frames):
        assert abs(frame[:, :60] - 40 * k).max() < 12 and abs(frame[:, 72:] - (255 - 40 * k)).max() < 12
    with Image.open(io.BytesIO(clip)) as file:
        assert file.info["loop"] == 0
        durations = []
        for k in range(5):
            file.seek(k)
            file.load()
            durations.append(file.info["duration"])
    assert durations == [400] * 4 + [500]


@pytest.fixture(scope="module")
def scene():
    """Hopper, to draw; where nothing can draw the tests that need it are skipped, but not in CI."""
    try:
        return page.Scene("Hopper-v4", "{}", 64)
    except Exception as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"nothing can draw here: {error}")


def test_a_scene_draws_what_moves_and_follows_the_robot(scene):
    upright = torch.tensor([0, 1.25, 0, 0, 0, 0.0])
    bent = upright + torch.tensor([0, 0, 0.5, 0, -0.7, 0])
    far = upright + torch.tensor([2.0 * 4, 0, 0, 0, 0, 0])  # whole periods of the floor's pattern
    images = [each.astype(int) for each in scene.draw(torch.stack([upright, bent, far, upright]))]
    assert images[0].shape == (64, 64, 3) and images[0].std() > 10
    assert (images[0] == images[3]).all()
    assert abs(images[1] - images[0]).mean() > 1
    assert abs(images[2][:, 24:40] - images[0][:, 24:40]).mean() < abs(images[1][:, 24:40] - images[0][:, 24:40]).mean()


@pytest.mark.full
def test_the_child_draws_says_what_it_cannot_draw_and_may_die(folder, scene):
    drawer = page.Drawer(folder, 1.0, 48)
    first, other = drawer.clip(0, 0), drawer.clip(0, 1)
    left, right = frames_of(first), frames_of(other)
    assert len(left) == LENGTH
    for a, b in zip(left, right):  # the sides are exchanged, up to WebP's losses
        assert abs(a[:, :48] - b[:, -48:]).mean() < 6 and abs(a[:, -48:] - b[:, :48]).mean() < 6
    torch.save({"pair": 12, "env_id": "NoSuchTask-v0", "env_kwargs": "{}", "states": torch.zeros(2, 3, 4)}, folder / "0000012.pt")
    with pytest.raises(RuntimeError, match="cannot draw: .*NoSuchTask"):
        drawer.clip(12, 0)
    drawer.child.kill()
    with pytest.raises(RuntimeError, match="has died"):
        drawer.clip(1, 0)
    assert len(frames_of(drawer.clip(1, 0))) == LENGTH
    frames = torch.arange(2 * 3 * 84 * 84).view(2, 3, 84, 84).to(torch.uint8)
    torch.save({"pair": 13, "env_id": "ALE/Pong-v5", "env_kwargs": "{}", "frames": frames}, folder / "0000013.pt")
    assert len(frames_of(drawer.clip(13, 0))) == 3
    child = drawer.child
    drawer.connection.close()  # as when the server is killed
    child.join(30)
    assert child.exitcode == 0


# ---- Label first -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a tiny run of drlhf on Hopper. Read only."""
    return train(run_dir=tmp_path_factory.mktemp("run"), reward_update="drlhf", save_model=True)


@pytest.mark.parametrize("source", ["run", "checkpoint alone", "model.pt alone"])
def test_label_first_plays_the_policy_and_its_states_are_those_of_the_inputs(trained, tmp_path, source):
    where = trained
    if source == "checkpoint alone":
        where = tmp_path / "copy"
        where.mkdir()
        for name in ("args.json", "checkpoint.pt"):
            shutil.copy(trained / name, where)
    elif source == "model.pt alone":
        where = shutil.copy(trained / "model.pt", tmp_path / "policy.pt")
    args = {"source": where, "pairs": 6, "fragment_length": LENGTH, "run_dir": tmp_path / "first", "noise": 0.0}
    folder = page.play(page.Args(**args))
    pairs = [torch.load(path, weights_only=True) for path in sorted((folder / "preferences").glob("*.pt"))]
    assert [each["pair"] for each in pairs] == list(range(6))
    agent = rlhf.load_policy(trained / "model.pt")
    for each in pairs:
        obs, actions = each["inputs"][..., :11], each["inputs"][..., 11:]
        assert torch.allclose(each["states"][..., 1:], obs[..., :5], atol=1e-6)  # Hopper's observation: qpos but its first, qvel
        assert torch.allclose(agent(obs), actions, atol=1e-5)  # its box is [-1, 1]
        assert (each["states"][:, 1:, 0] != each["states"][:, :-1, 0]).all()  # it moves
    noisy = page.play(page.Args(**args | {"noise": 0.5, "seed": 2}))
    inputs = torch.load(noisy / "preferences/0000000.pt", weights_only=True)["inputs"]
    assert not torch.allclose(agent(inputs[..., :11]), inputs[..., 11:], atol=0.1) and inputs[..., 11:].abs().max() <= 1


class Numbered:
    """Parallel games, one, whose images show their numbers: consecutive ones in an episode of 12 steps, ten left out after it."""

    def reset(self):
        self.newest, self.steps = 3, 0
        return self.images(), {}

    def images(self):
        numbers = np.arange(self.newest - 3, self.newest + 1, dtype=np.uint8)
        return np.broadcast_to(numbers[None, :, None, None], (1, 4, 84, 84)).copy()

    def step(self, actions):
        assert actions.tolist() == [self.newest]
        self.steps += 1
        self.newest += 10 if self.steps % 13 == 0 else 1  # the row after an end is a reset
        return self.images(), np.zeros(1), np.array([self.steps % 13 == 12]), np.array([False]), {}


def test_label_first_on_atari_stores_consecutive_frames_of_one_life(tmp_path, monkeypatch):
    module = SimpleNamespace(game_name=None, make_envs=lambda run_args, count, seed: Numbered())
    run_args = SimpleNamespace(env_id="ALE/Pong-v5", env_kwargs="{}")
    monkeypatch.setattr(page, "load_run", lambda source: (module, run_args, lambda images: images[:, 3, 0, 0].long()))
    folder = page.play(page.Args(source=tmp_path, pairs=20, fragment_length=3, run_dir=tmp_path / "first"))
    pairs = [torch.load(path, weights_only=True) for path in (folder / "preferences").glob("*.pt")]
    assert folder.name.startswith("ALE_Pong-v5__label_preferences__1__") and len(pairs) == 20
    for each in pairs:
        assert each["frames"].shape == (2, 6, 84, 84) and each["frames"].dtype == torch.uint8
        numbers = each["frames"][..., 0, 0].long()
        assert (numbers.diff() == 1).all() and torch.equal(each["actions"], numbers[:, 3:])


def label(folder, count: int, rule) -> None:
    """Answer `count` questions with `rule(pair file) -> left or right fragment preferred, 0 or 1`."""
    labels = labels_of(folder / "preferences")
    for _ in range(count):
        question = labels.next("1")
        pair = torch.load(folder / f"preferences/{question['pair']:07}.pt", weights_only=True)
        word = "left" if rule(pair) == question["left"] else "right"
        assert labels.answer("1", question["pair"], False, word, 0.0)
    labels.file.close()


def leans(pair: dict) -> int:
    """A rule that a network can learn: the fragment with the larger sum of the first observation."""
    return int(pair["inputs"][1, :, 0].sum() > pair["inputs"][0, :, 0].sum())


def test_a_run_learns_from_a_file_of_labels_and_reports_the_accuracy_on_those_it_never_saw(tmp_path):
    folder = write_pairs(tmp_path / "first", 200)
    label(folder, 200, leans)
    file = folder / "preferences/labels.jsonl"
    changes = {"labels": file, "reward_update": "drlhf", "queue_size": 300, "warmup_epochs": 20, "reward_learning_rate": 3e-3}
    changes |= {"reward_width": 32, "total_timesteps": 128}
    run = train(run_dir=tmp_path / "runs", **changes)
    rows = read_csv(run / "metrics.csv")
    assert [row["bilevel/labels"] for row in rows] == ["180.0"] * 2  # nobody was asked for more, each tenth is held out
    assert float(rows[-1]["bilevel/label_accuracy"]) > 0.8
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    columns = checkpoint["queue"]["columns"]
    held = torch.stack([torch.load(path, weights_only=True)["inputs"] for path in sorted(file.parent.glob("*9.pt"))])
    assert len(held) == 20 and not (columns[0].unsqueeze(1) == held).flatten(2).all(-1).any()
    for inputs, y in zip(*columns):
        assert y == 1 - leans({"inputs": inputs})


@pytest.mark.parametrize("env_id, length", [("HopperLookalike-v0", LENGTH), ("Hopper-v4", 1), ("Hopper-v4", LENGTH + 1)])
def test_labels_of_another_task_or_length_are_refused(tmp_path, env_id, length):
    """Also where the shapes fit, as HalfCheetah's and Walker2d's do, or one would be stretched to the other."""
    folder, task = tmp_path / "first", SimpleNamespace(env_id=env_id, env_kwargs="{}")
    folder.mkdir()
    page.ask_people(folder / "preferences", task, inputs=torch.randn(3, 2, length, 14), states=torch.zeros(3, 2, length, 6))
    label(folder, 3, leans)
    with pytest.raises(rlhf.BadInput, match=f"--labels .*pairs of .*{env_id}"):
        train(run_dir=tmp_path / "runs", labels=folder / "preferences/labels.jsonl", reward_update="drlhf")
    assert not (tmp_path / "runs").exists()


def test_labels_may_be_whole_numbers(folder):
    (folder / "labels.jsonl").write_text('{"pair": 3, "answer": "left", "label": 1, "repeat": false}\n')
    assert rlhf.labelled_pairs(folder / "labels.jsonl", set())[1].dtype == torch.float32


def test_label_accuracy_is_measured_before_the_network_learns_from_the_labels(tmp_path):
    """After 60 passes over them it is right on nearly all, with which a random network has nothing to do."""
    changes = {"total_timesteps": 128, "warmup_pairs": 40, "warmup_epochs": 60, "reward_learning_rate": 3e-3}
    folder = train(run_dir=tmp_path, reward_update="drlhf", **changes)
    row = read_csv(folder / "metrics.csv")[0]
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    inputs, labels = checkpoint["queue"]["columns"]
    network = rlhf.RewardEnsemble([rlhf.RewardNetwork(inputs.shape[-1], TINY["reward_width"])])
    network.load_state_dict(checkpoint["reward"])
    returns = network(inputs).sum(-1)
    after = ((returns[:, 0] > returns[:, 1]).float() == labels).float().mean()
    assert after > 0.85 and float(row["bilevel/label_accuracy"]) < 0.75


@pytest.mark.parametrize("wait", [True, False])
def test_a_run_asks_people_and_learns_from_their_labels(tmp_path, wait):
    """A thread in their place answers by a rule that is not the true reward; the run waits for it, or goes on without."""
    changes = {"teacher": "human", "run_dir": tmp_path, "wait_for_labels": wait, "label_budget": 8}
    done, problems = [], []

    def people():
        try:
            while not (found := list(tmp_path.glob("*/preferences/*.pt"))):
                time.sleep(0.05)
            folder = found[0].parent.parent
            labels = labels_of(folder / "preferences")
            while not done:
                if question := labels.next("1"):
                    pair = torch.load(folder / f"preferences/{question['pair']:07}.pt", weights_only=True)
                    labels.answer("1", question["pair"], False, "left" if leans(pair) == question["left"] else "right", 0.0)
                time.sleep(0.01)
        except BaseException as error:
            problems.append(error)
            raise

    thread = threading.Thread(target=people, daemon=True)
    thread.start()
    run = train(**changes)
    done.append(1)
    thread.join(30)
    assert not problems
    rows = read_csv(run / "metrics.csv")
    assert page.pairs_asked(run / "preferences") == [*range(8)]
    labels = [float(row["bilevel/labels"]) for row in rows]
    assert labels == [4, 6, 8] if wait else labels == sorted(labels)
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    assert checkpoint["taken"] == list(range(8)) or not wait
    for inputs, y in zip(*checkpoint["queue"]["columns"]):
        assert y == 1 - leans({"inputs": inputs})
    states = torch.load(run / "preferences/0000000.pt", weights_only=True)
    assert torch.allclose(states["states"][..., 1:], states["inputs"][..., :5], atol=1e-6)


@pytest.mark.full
def test_a_run_that_waits_for_people_stops_when_it_is_told_to_and_goes_on_later(tmp_path):
    """Killed while nobody answers; the pairs wait, and their labels are in the queue of the resumed run."""
    words = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    command = [sys.executable, str(REPO / "sobirl_rlhf.py"), *words, "--teacher", "human", "--label-budget", "4"]
    process = subprocess.Popen([*command, "--run-dir", str(tmp_path)], env=environment(), stderr=subprocess.PIPE, text=True)
    limit = time.monotonic() + 120
    while len(list(tmp_path.glob("*/preferences/*.pt"))) < 4:
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    (folder,) = tmp_path.iterdir()
    assert process.returncode == 128 + signal.SIGTERM and f"python label_preferences.py {folder}" in err
    label(folder, 4, leans)
    rlhf.train(rlhf.parse_args(["--resume", str(folder)]))
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["taken"] == [0, 1, 2, 3] and checkpoint["queue"]["added"] == 4
    assert json.loads((folder / "result.json").read_text())["status"] == "finished"


# ---- In a browser ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def browser():
    """Headless Chromium; without it the tests are skipped, but not in CI."""
    if missing := browser_missing():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    driver = open_browser()
    yield driver
    driver.quit()


@pytest.fixture
def servers():
    """Starts servers, and ends those that are left."""
    running = []

    def start(folder, *words):
        process, address = serve(folder, *words)
        running.append(process)
        return process, address

    yield start
    for process in running:
        process.kill()
        process.wait()


@pytest.mark.full
def test_a_persons_round_in_the_browser(browser, servers, scene, tmp_path):
    """Ten labels by keys with an undo; a server that is killed and started again; two tabs; wrong addresses; and a run that
    learns from these labels."""
    folder = write_pairs(tmp_path / "run", 14)
    file = folder / "preferences/labels.jsonl"
    process, address = servers(folder, "--repeat-every", "0", "--clip-size", "48")
    browser.get(address)
    shown(browser)
    press(browser, "u")
    time.sleep(2)  # the question comes again, and what was wrong stays to be read
    assert browser.find_element("id", "note").text == "There is nothing to undo."
    assert [entry for entry in browser.get_log("browser") if "409" not in entry["message"]] == []
    given = {}
    for key in ("left", "right", "down", "s", "left", "right", "left", "left", "right"):
        question = shown(browser)
        given[question["pair"]] = key, question["left"]
        press(browser, key)
    undone = list(given)[-1]
    shown(browser)
    press(browser, "u")
    assert shown(browser)["pair"] == undone
    assert browser.find_element("id", "progress").text == "8 of 14"
    for key in ("down", "right"):
        question = shown(browser)
        given[question["pair"]] = key, question["left"]
        press(browser, key)
    shown(browser)
    text = browser.find_element("tag name", "body").text
    assert "10 of 14" in text and not re.search("reward|return", text, re.IGNORECASE)

    process.kill()  # while tab 1 looks at a pair
    process.wait()
    told = page.read_labels(file)
    expected = {pair: {"left": 1 - left, "right": left, "down": 0.5}.get(key) for pair, (key, left) in given.items()}
    assert told == expected and len(told) == 10
    assert all(row["seconds"] > 0 for row in lines(file.parent) if row["answer"] != "undo")

    _, address = servers(folder, "--repeat-every", "0", "--clip-size", "48", "--labeller", "bo")
    browser.get(address)
    first, one = shown(browser), browser.current_window_handle
    assert browser.find_element("id", "progress").text == "10 of 14"
    browser.switch_to.new_window("tab")
    browser.get(address)
    second = shown(browser)
    assert first["pair"] != second["pair"] and not {first["pair"], second["pair"]} & set(told)
    press(browser, "left")
    third = shown(browser)
    browser.switch_to.window(one)
    press(browser, "left")
    fourth = shown(browser)
    assert len({each["pair"] for each in (first, second, third, fourth)} - set(told)) == 4
    press(browser, "right")
    browser.switch_to.window(browser.window_handles[1])
    press(browser, "right")
    wait(browser, lambda: "All pairs are answered" in browser.find_element("id", "note").text)
    answers = [row["pair"] for row in lines(file.parent) if row["labeller"] == "bo"]
    assert len(answers) == len(set(answers)) == 4 and len(page.read_labels(file)) == 14
    problems = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert [each for each in problems if "ERR_CONNECTION_REFUSED" not in each] == []  # those while no server ran

    base, token = re.match(r"(http://[^/]+/)(.+)/$", address).groups()
    for wrong in (f"{base}{token[:-1]}/", base, f"{base}{token}/../../labels.jsonl", f"{base}{token}/clip/..%2flabels.jsonl/0"):
        browser.get(wrong)
        assert "Forbidden" in browser.find_element("tag name", "body").text, wrong
    browser.close()
    browser.switch_to.window(one)

    run = train(run_dir=tmp_path / "runs", reward_update="drlhf", labels=file)
    rows = read_csv(run / "metrics.csv")
    held = {pair for pair, y in page.read_labels(file).items() if y not in (None, 0.5) and pair % 10 == 9}
    accuracy = rows[-1]["bilevel/label_accuracy"]
    assert math.isfinite(float(accuracy)) if held else accuracy == ""
    assert float(rows[-1]["bilevel/labels"]) == sum(y is not None for pair, y in page.read_labels(file).items() if pair % 10 != 9)


@pytest.mark.parametrize(
    "name, text",
    [("args.json", "{"), ("args.json", "[]"), ("args.json", '{"args": 3}'), ("preferences/labels.jsonl", "3\n"),
     ("preferences/labels.jsonl", '{"pair": 1}\n'), ("preferences/labels.jsonl", "\0\n")],
)  # fmt: skip
def test_a_damaged_file_is_bad_input_and_stays_as_it_is(folder, name, text):
    (folder.parent / name).write_text(text)
    with pytest.raises(page.BadInput, match=f"{name}.* cannot be used"):
        page.main(page.Args(source=folder.parent, port=0))
    assert (folder.parent / name).read_text() == text


@pytest.mark.full
def test_the_server_from_the_command_line(servers, tmp_path):
    """Two servers of one folder, a port in use, a folder without pairs: one sentence each. A warning for another address. The
    end tells what was done. And the child ends when the server is killed."""
    folder = write_pairs(tmp_path / "run", 3)
    process, address = servers(folder)
    port = address.split(":")[2].split("/")[0]
    for words, sentence in (
        ([str(folder), "--port", "0"], "is being labelled through another server"),
        ([str(folder), "--port", port], "--port 0 takes a free one"),
        ([str(tmp_path), "--port", "0"], "has no pairs: it needs --teacher human, or use --pairs here"),
        ([str(tmp_path / "none"), "--port", "0", "--pairs", "3"], "it must be a run folder"),
    ):
        command = [sys.executable, str(REPO / "label_preferences.py"), *words]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
        assert done.returncode == 2 and sentence in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "preferences").exists() and not (tmp_path / "none").exists()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "0 pairs answered, the same again 0 of 0" in out
    process, address = servers(folder, "--host", "0.0.0.0")
    assert "warning: whoever reaches 0.0.0.0" in process.before
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if children.exists():
        before = children.read_text().split()
        process.kill()
        limit = time.monotonic() + 300  # it may still be importing
        while any(Path(f"/proc/{pid}").exists() for pid in before):
            assert time.monotonic() < limit, "the child that draws outlives its server"
            time.sleep(0.2)
